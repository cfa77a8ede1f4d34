"""What a run file says about the model."""

from typing import Literal

from tunesmith.settings import Settings

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSettings(Settings):
    """The base model and how it is loaded."""

    name: str = "smollm2-135m-instruct"
    """A path (directory or .gguf file), a zoo name (`tunesmith models`), or a Hub id."""
    revision: str | None = None
    """Hub revision: a commit, tag or branch."""
    dtype: DtypeName = "auto"
    """Dtype of the frozen weights; auto is bfloat16 where the hardware computes it well."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the weights of the blocks in 4 bits (nf4, QLoRA, Dettmers et al. 2023) or 8 bits (int8,
    LLM.int8(), Dettmers et al. 2022); dtype is then what is multiplied in. What trains stays in
    float32. Needs bitsandbytes: pip install 'tunesmith[quantize]'."""
    double_quantize: bool = True
    """With nf4: keep the scales of the 4-bit blocks in 8 bits, which saves 0.37 bits a weight."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation; auto is segment-aware, which packing and padding-free need."""
    tokenizer: str | None = None
    """Where the tokenizer comes from, if not from the model: a path, zoo name or Hub id."""
    chat_template: str | None = None
    """A built-in template (`chatml`, `plain`, `text`) or a path to a Jinja file, instead of the
    model's; `text` is the turns' bare text, as encoder-decoders without a template read it."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Off unless you have read that code."""
