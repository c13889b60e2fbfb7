"""Every error that lorafx raises for something a user can mend. Each says what was got, expected, and what to do."""


class LorafxError(Exception):
    """The root: ``except lorafx.LorafxError`` catches whatever lorafx refuses by name."""


class AdapterFormatError(LorafxError):
    """What was given can't be read as a LoRA adapter of a kind that lorafx runs."""


class AdapterMismatchError(LorafxError):
    """An adapter, a name or a list of names does not fit the model, the bank or the batch."""


class CapacityError(LorafxError):
    """There is no room, and making some was ruled out."""


class UnsupportedModelError(LorafxError):
    """The model, or the way it is run, is one that lorafx can't serve."""
