"""Messages in the words of the command line."""

import argparse

import pytest

from optimum_mixrank.commands.mixrank import MixRankCommand
from optimum_mixrank.commands.wording import OPTIONS, in_words_of_the_command_line


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "save_directory='out' is not empty; choose another, or pass overwrite=True to replace it.",
            "--output out is not empty; choose another, or pass --overwrite to replace it.",
        ),
        ("compensation=['sequential', 'blocks'] is wrong", "--compensation sequential blocks is wrong"),
        ("metric='svd' and compensation=[] need `dataset`.", "--metric svd and --compensation none need --dataset."),
        ("compression_ratio=0.5 is reachable, epochs=10.", "--ratio 0.5 is reachable, --epochs 10."),
        ("set mirror=False", "set --no-mirror"),
        ("pass `interpolate_pos_encoding=True`; go on", "pass --interpolate-pos-encoding; go on"),
        ("auto_class=… or nothing", "--auto-class … or nothing"),
        ("save_directory='my models' exists", "--output 'my models' exists"),
        ("rank_pattern has the key 'qery'", "--rank-pattern has the key 'qery'"),
        ("rank_pattern['query']=64.5 is not an integer", "--rank-pattern query=64.5 is not an integer"),
        ("Or give the number as target_parameters.", "Or give the number as --target-parameters."),
        ("include has 'head', which is unknown", "--include has 'head', which is unknown"),
        ("latency_table=None is not a file", "--latency-table (not given) is not a file"),
        # The settings of a run that was cut off are named as they are stored.
        ("compression_ratio was 0.5 and is 0.4", "compression_ratio was 0.5 and is 0.4"),
        ("'max_memory' in a/max_memory, max_memory.json", "'max_memory' in a/max_memory, max_memory.json"),
        # What is no argument of ours, or lies inside a path, stays.
        ("image_size=3 in /data/seed=3/x, 'seed=4'", "image_size=3 in /data/seed=3/x, 'seed=4'"),
        ("The dataset is empty.", "The dataset is empty."),
    ],
)
def test_arguments_become_options(message, expected):
    assert in_words_of_the_command_line(message) == expected


def test_all_of_these_options_exist():
    subparsers = argparse.ArgumentParser().add_subparsers()
    parent = MixRankCommand(subparsers)
    known = {option for each in parent.registered_subcommands for option in each.parser._option_string_actions}
    assert set(OPTIONS.values()) <= known
