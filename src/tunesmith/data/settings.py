"""What a run file says about data."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tunesmith.settings import Settings

FormatName = Literal[
    "auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text", "text_label"
]


class Source(Settings):
    """One place that rows come from."""

    path: str
    """A file, folder or glob (.json .jsonl .csv .tsv .parquet .txt, also .gz), a generator
    (`generated/arithmetic:digits=2`), a zoo name, or a Hub data set."""
    split: str | None = None
    """Split of a Hub or zoo data set, or of a folder whose files are named by split; `train` where
    none is given."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    revision: str | None = None
    """Revision of a Hub data set: a commit, tag or branch."""
    format: FormatName = "auto"
    """How a row is laid out; auto recognises it by its keys."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name to the file's, where they differ: {prompt: mr, completion: ref}."""
    prompt: str | None = None
    """Instead of a format: the user turn as a template over the row's columns, `Review: {text}`."""
    completion: str | None = None
    """With `prompt`: the assistant turn as a template over the row's columns, `{label}`."""
    system: str | None = None
    """A system turn put before rows that have none."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the others."""
    skip: int = Field(default=0, ge=0)
    """Leave out the first so many rows: with `limit`, parts of one file that have no row in
    common."""
    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many rows, after those that `skip` leaves out."""

    @model_validator(mode="after")
    def _templates_agree(self) -> Self:
        if (self.prompt is None) != (self.completion is None):
            given, other = ("prompt", "completion") if self.prompt else ("completion", "prompt")
            raise ValueError(f"`{given}` is a template and needs `{other}` beside it")
        if self.prompt is not None and (self.format != "auto" or self.columns):
            raise ValueError("`prompt` and `completion` replace `format` and `columns`")
        return self


class DataSettings(Settings):
    """The rows to learn from and to be judged on, and how they become tokens."""

    train: list[Source] = Field(min_length=1)
    """Sources to train on; several are mixed by weight."""
    pretraining: list[Source] = Field(default_factory=list)
    """Texts that a run which learns from its own replies goes on learning from, so that it does not
    forget them: see objective.pretraining_weight."""
    evaluation: list[Source] = Field(default_factory=list)
    """Sources to evaluate on; empty takes `holdout` rows from the training data."""
    holdout: int | float = Field(default=0, ge=0)
    """Rows (or a fraction below 1) kept out of training for evaluation, the same for every run
    with the same data; used only where `evaluation` is empty."""
    holdout_seed: int = Field(default=0, ge=0)
    """Decides which rows `holdout` takes. Not the run's seed, so that runs with other seeds are
    judged by the same rows."""
    max_length: int = Field(default=1024, ge=8)
    """Tokens a row may have, for an encoder-decoder prompt and reply together; longer rows are cut
    at the end, or dropped where the cut would leave no supervised token."""
    packing: bool = False
    """Fill rows of `max_length` with several samples that cannot see each other; not for an
    encoder-decoder, whose samples are pairs."""
    supervise: Literal["assistant", "all"] = "assistant"
    """Which tokens carry loss: the assistant's turns with their end-of-turn, or the whole text."""
    shuffle: bool = True
    """Shuffle anew in every epoch, by the run's seed."""
    streaming: bool = False
    """Read while training instead of before it, in constant memory; needs train.max_steps."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """With streaming: rows held in memory to shuffle among."""
    mixing: Literal["concatenate", "weighted"] = "concatenate"
    """Several sources: every row once an epoch, or by weight: an epoch then holds every row of the
    largest source once and of each other source as many as its weight asks for, smaller ones
    repeating."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be read stops the run, or is skipped and counted."""
    max_dropped: float = Field(default=0.2, ge=0, le=1)
    """Stop if more than this share of rows would be dropped."""
    workers: int = Field(default=0, ge=0)
    """Processes that tokenise; 0 takes as many as there are cores where the data is large."""

    @model_validator(mode="after")
    def _streams_can_start(self) -> Self:
        if self.streaming and 0 < self.holdout < 1:
            raise ValueError(
                "`holdout` is a share, which needs the number of rows, and `streaming` does not "
                "know it; give a number of rows"
            )
        return self
