"""What `save_pretrained` of the models of Transformers does besides if they are compressed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .composite import Attach, describe_factored_layers
from .entries import compressed_layers
from .held_twice import state_of_every_place
from .other_releases import stored_with_prefixes
from .plain import saved_plainly
from .self_contained import brings_code, code_included
from .stacking import stored_apart


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPED = "_describes_factored_layers"


def describe_on_saving(model_class: type[PreTrainedModel], attach: Attach) -> None:
    """Make `save_pretrained` of all models describe their factored layers first; does nothing the second time.

    Transformers calls nothing of a part when the whole is saved. The method gets one more argument, `self_contained`:
    whether the checkpoint is to bring the code that opens it; by default it does if the model was loaded from one that
    does. Models that hold a layer in two places undeclared, which Transformers refuses to save, are saved; see
    `held_twice`.
    """
    save = model_class.save_pretrained
    if getattr(save, _WRAPPED, False):
        return

    @functools.wraps(save)
    def save_pretrained(
        self: PreTrainedModel, save_directory: Any, *args: Any, self_contained: bool | None = None, **kwargs: Any
    ) -> Any:
        # With an adapter on the factors, Transformers saves the adapter alone; models that bring their code describe
        # themselves.
        if getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "is_self_contained", False):
            with stored_apart(self):
                return save(self, save_directory, *args, **kwargs)
        describe_factored_layers(self, attach)
        if not compressed_layers(self):
            if self_contained:
                raise ValueError(
                    f"self_contained=True: this {type(self).__name__} holds no factored layer and needs no code; leave it "
                    "out."
                )
            if len(args) < 2 and kwargs.get("state_dict") is None and kwargs.get("is_main_process", True):
                kwargs["state_dict"] = state_of_every_place(self)
            with stored_apart(self):
                return save(self, save_directory, *args, **kwargs)
        with stored_with_prefixes(self), stored_apart(self), saved_plainly(self) as is_plain:
            if is_plain:
                return save(self, save_directory, *args, **kwargs)
            _check_upload(self, self_contained, kwargs)
            with code_included(self, Path(save_directory), self_contained):
                return save(self, save_directory, *args, **kwargs)

    setattr(save_pretrained, _WRAPPED, True)
    setattr(model_class, "save_pretrained", save_pretrained)  # noqa: B010 - mypy allows no plain assignment


def _check_upload(model: PreTrainedModel, self_contained: bool | None, kwargs: dict[str, Any]) -> None:
    """Refuse what would upload a checkpoint without its code: Transformers uploads only files that it has written."""
    if kwargs.get("push_to_hub") and (brings_code(model.config) if self_contained is None else self_contained):
        raise ValueError(
            "push_to_hub=True would upload a self-contained checkpoint without its code. Use "
            "`MixRankCompressor.push_to_hub(model, repo_id, self_contained=True)`, or save to a folder and upload that "
            "with `hf upload`."
        )
