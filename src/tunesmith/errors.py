"""What can go wrong, as kinds a caller can catch; the command line prints them in one line."""


class TunesmithError(Exception):
    """Any error whose message tells the user what is wrong, where, and what would be right."""

    exit_code = 2


class SpecError(TunesmithError):
    """A run file or an override says something that no run can mean."""


class DataError(TunesmithError):
    """A data file, row or format cannot be used."""


class RewardError(DataError):
    """A reward function cannot score a row."""

    def __init__(self, row: int, why: str) -> None:
        """Name the row, counted from 0 among those that were to be scored, and what is wrong."""
        super().__init__(f"row {row}: {why}")
        self.row = row
        self.why = why


class ModelError(TunesmithError):
    """A model, tokenizer or architecture cannot be loaded or understood."""


class MethodError(TunesmithError):
    """A method cannot do this on this model."""


class AdapterError(TunesmithError):
    """A saved adapter is damaged or belongs to another base model."""


class CheckpointError(TunesmithError):
    """A checkpoint or run directory cannot be written or resumed."""


class SetupError(TunesmithError):
    """The machine lacks something: a package, the network, disk space."""


class ProofError(TunesmithError):
    """A check that guards against a silently wrong run failed."""

    exit_code = 3


class TrainingError(TunesmithError):
    """Training cannot go on: the loss stays non-finite, or memory does not suffice."""

    exit_code = 4
