"""What a run file says about the model."""

from typing import Literal, Self

from pydantic import model_validator

from tunesmith.settings import Settings

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSettings(Settings):
    """The base model and how it is loaded."""

    name: str = "smollm2-135m-instruct"
    """A path (directory or .gguf file), a zoo name (`tunesmith models`), or a Hub id."""
    adapter: str | None = None
    """A saved adapter, or the directory of a run that left one, merged into the base before
    anything else: the run then starts from it, and it belongs to what `disabled` and a reference
    mean by the base."""
    revision: str | None = None
    """Hub revision of the model: a commit, tag or branch."""
    dtype: DtypeName = "auto"
    """Dtype of the frozen weights; auto is bfloat16 where the hardware computes it well. float16 is
    for GPUs that multiply nothing else as fast (T4, V100); the loss is scaled then, so that small
    gradients are not lost."""
    quantize: Literal["none", "fp8", "nf4", "int8"] = "none"
    """Keep the weights of the blocks in 8-bit floats that are also multiplied in (fp8, the fastest,
    on GPUs of compute capability 8.9 and more), 4 bits (nf4, QLoRA, Dettmers et al. 2023) or 8-bit
    whole numbers (int8, LLM.int8(), Dettmers et al. 2022); dtype is then that of all else. What
    trains stays in float32. nf4 and int8 need bitsandbytes: pip install 'tunesmith[quantize]'."""
    products: Literal["dtype", "float8"] = "dtype"
    """With nf4: what products are computed in; float8 rounds weights and inputs once more, and is
    faster where quantize: fp8 is."""
    double_quantize: bool = True
    """With nf4: keep the scales of the 4-bit blocks in 8 bits, which saves 0.37 bits a weight."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; auto is segment-aware, which packing and padding-free need."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from the model: a path, zoo name or Hub id, whose
    newest revision is taken."""
    chat_template: str | None = None
    """A built-in template (`chatml`, `plain`, `text`) or a path to a Jinja file, instead of the
    model's; `text` is the turns' bare text, as encoder-decoders without a template read it."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Off unless you have read that code."""

    @property
    def multiplies_float8(self) -> bool:
        """Whether the products of the blocks are those of 8-bit floats."""
        return self.quantize == "fp8" or (self.quantize == "nf4" and self.products == "float8")

    @model_validator(mode="after")
    def _products_of_codes(self) -> Self:
        if self.products == "float8" and self.quantize not in {"fp8", "nf4"}:
            raise ValueError(
                f"products: float8 has no effect with quantize: {self.quantize}; use quantize: fp8 "
                "or nf4, or products: dtype"
            )
        return self
