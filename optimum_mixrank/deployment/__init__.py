"""Models for other runtimes: writing them, running them, and whether they still compute what their source does."""
