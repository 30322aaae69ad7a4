"""From settings to a model: the frozen weights, earlier adapters, four bits, the processor."""

from __future__ import annotations

import functools
import os
import pkgutil
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator
from torch import Tensor, nn

from povid.fault import Fault
from povid.fetching import hub
from povid.internals import keep_input_gradients, processor_class, without_video
from povid.model.architectures import Architecture, architecture_of
from povid.model.policy import Policy
from povid.model.question import WHOLE, Answerer, Share
from povid.model.template import Template

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKAGE = Path(__file__).parents[1]
PROCESSOR_FILES = (
    "*processor_config.json",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
    "qformer_tokenizer/*",
)


class LoraSettings(BaseModel):
    """LoRA on every linear layer of the language model except its head (Table 5: r 128, alpha 256)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    r: int = Field(128, ge=1)
    alpha: int | float = Field(256, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)


class LocalModel(BaseModel):
    """A model whose weights are loaded into this process, to be trained or evaluated.

    Args:
        name: its name in results.
        path: folder or hub id; ``package:NAME`` is a folder shipped inside povid.
        dtype: of the frozen weights. What is trained is in float32 at least.
        style, system, pad_square, max_length, masking: see ``Template``.
        train_projector: whether the projector is trained along with LoRA.
        attention: transformers' ``attn_implementation``; None for its own choice.
        gradient_checkpointing: recompute activations in the backward pass, which takes time, saves memory and changes
            no number; None: where a step would not fit otherwise (``povid.training.memory.fit``).
        quantize: ``4bit`` keeps the language model's frozen weights in four bits (NF4, by bitsandbytes).
        merge: ``float16`` merges earlier adapters into the weights in float16 and casts the result to ``dtype``, as the
            released scripts do; rounding loses most of a small update. None keeps what ``dtype`` can hold
            (``load_model``).
        fused: use the faster modules of ``povid.model.fused`` while training; ``liger``: those of
            ``povid.model.liger``, for a GPU.
        compile: compile the decoder's layers (``torch.compile``) while training; the first steps then take minutes.
        prepare: called (Hydra's ``_target_``) before the model is loaded, to make its folder.
        architecture: what is special about the model (``povid.model.architectures.Architecture``: its keys, or a
            ``_target_`` that makes one); None looks it up by the model's type.
        lora: the adapter.

    Raises:
        pydantic.ValidationError: a key is unknown or missing, or a value has the wrong type or lies out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    trainable: ClassVar[bool] = True

    name: str = Field(min_length=1)
    path: str = Field(min_length=1)
    dtype: Dtype = "bfloat16"
    style: Literal["vicuna_v1", "chat", "bare"] = "vicuna_v1"
    system: str = ""
    pad_square: bool = False
    max_length: int = Field(1024, ge=1)
    masking: Literal["all", "released"] = "all"
    train_projector: bool = True
    attention: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    gradient_checkpointing: bool | None = None
    quantize: Literal["4bit"] | None = None
    merge: Literal["float16"] | None = None
    fused: bool | Literal["liger"] = True
    compile: bool = False
    prepare: dict[str, Any] | None = None
    architecture: SerializeAsAny[Architecture] | None = None
    lora: LoraSettings = LoraSettings()

    @model_validator(mode="after")
    def _merges_whole_weights(self) -> Self:
        if self.merge and self.quantize:
            raise ValueError(
                "merge and quantize exclude each other: four-bit weights cannot be merged; set one to null"
            )
        return self

    @model_validator(mode="after")
    def _can_run_here(self) -> Self:
        if self.fused == "liger":
            if self.compile:
                raise ValueError(
                    "compile=true and fused=liger exclude each other, since the compiler writes such kernels itself; "
                    "choose one"
                )
            if find_spec("liger_kernel") is None:
                raise ValueError(
                    "fused=liger needs liger-kernel, which is not installed: pip install 'povid[liger]', or set "
                    "fused=true"
                )
            if not torch.cuda.is_available():
                raise ValueError("fused=liger needs a GPU, and none was found; set fused=true")
        compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
        if self.compile and not torch.cuda.is_available() and not any(shutil.which(name) for name in compilers if name):
            raise ValueError("compile=true needs a C++ compiler on a CPU, and none was found; install g++ or set false")
        return self

    @field_validator("path")
    @classmethod
    def _is_shipped(cls, path: str) -> str:
        if path.startswith("package:") and not (PACKAGE / path.removeprefix("package:")).is_dir():
            raise ValueError(f"povid contains no folder {path.removeprefix('package:')!r}; name a folder or a hub id")
        return path

    @field_validator("architecture", mode="before")
    @classmethod
    def _build(cls, node: Any) -> Any:
        if not isinstance(node, Mapping) or "_target_" not in node:
            return node
        try:
            target = pkgutil.resolve_name(node["_target_"])
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{node['_target_']!r} cannot be imported ({error}); name a class or function") from error
        return target(**{key: value for key, value in node.items() if key != "_target_"})

    @property
    def answers_depend_on_batch(self) -> bool:
        """Whether an answer can change with the questions beside it in its batch, as rounding does in few bits."""
        return self.dtype not in ("float32", "float64") or self.quantize is not None

    @property
    def source(self) -> str:
        """What transformers loads: a folder or a hub id."""
        return str(PACKAGE / self.path.removeprefix("package:")) if self.path.startswith("package:") else self.path

    def policy(self, adapters: Sequence[Path] = (), *, adapted: bool) -> Policy:
        """The model with earlier adapters in it, in their order, and a new adapter if ``adapted``; on the CPU.

        Raises:
            Fault: see ``load_model`` and ``load_processor``.
        """
        return Policy(self.load_model(adapters), self.load_processor(), self, adapted=adapted)

    def template(self, processor: Any) -> Template:
        """How this model is prompted."""
        return Template(
            processor,
            style=self.style,
            system=self.system,
            pad_square=self.pad_square,
            max_length=self.max_length,
            masking=self.masking,
        )

    def answerer(
        self,
        adapters: Sequence[Path] = (),
        *,
        batch_size: int,
        seed: int = 0,
        device: torch.device | None = None,
        share: Share = WHOLE,
    ) -> Answerer:
        """The model with its adapters, ready to answer questions on a device (None: the CPU).

        ``batch_size`` questions are answered together; ``seed`` is that of sampling; ``share`` is the part of all
        questions that this process answers.
        """
        from povid.model.generation import Answers

        policy = self.policy(adapters, adapted=False).to(device)
        return Answers(policy, self.template(policy.processor), batch_size, seed, share=share)

    def load_model(self, adapters: Sequence[Path] = (), *, merged: bool = False) -> Any:
        """The frozen model with earlier adapters in it, in their order.

        In float32 they are merged into its weights. In fewer bits rounding would swallow most of what steps of 1e-7 add
        up to, so they stay beside the weights, unless ``merged`` asks for a model without them or the setting ``merge``
        for the rounding.

        Raises:
            Fault: the weights cannot be found, a folder holds no adapter, or four bits are wanted and bitsandbytes is
                not installed.
        """
        for adapter in adapters:
            if not (adapter / "adapter_config.json").exists():
                raise Fault(f"{adapter} holds no adapter_config.json; name a run folder or an adapter folder")
        from transformers import AutoModelForImageTextToText

        options = self._four_bits() if self.quantize else {}
        if self.attention:
            options["attn_implementation"] = self.attention
        dtype = DTYPES[self.merge if self.merge and adapters else self.dtype]
        with self._loading():
            if not Path(self.source).is_dir():
                hub.download_weights(self.source)
            model: Any = AutoModelForImageTextToText.from_pretrained(self.source, dtype=dtype, **options)
        keep_input_gradients(model)
        whole = merged or self.merge or (self.dtype in ("float32", "float64") and not self.quantize)
        for number, adapter in enumerate(adapters):
            model = _merge(model, adapter) if whole else self._attach(model, adapter, number)
        if self.merge:
            _cast(model, DTYPES[self.dtype])
        return model.requires_grad_(False)

    def load_processor(self) -> Any:
        """The processor. Pillow resizes the pictures, so that they are the same with and without torchvision.

        Raises:
            Fault: its files cannot be found, or transformers has no processor for this kind of model.
        """
        from transformers import AutoConfig

        with self._loading():
            config = AutoConfig.from_pretrained(self.source)
            kind = processor_class(config)
            if kind is None:
                raise Fault(
                    f"model {self.name!r}: transformers has no image and text processor for {config.model_type!r} "
                    "models; name a vision-language model, or serve it and use model=served"
                )
            processor = without_video(kind).from_pretrained(self.source, backend="pil")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"
        first = tokenizer.bos_token_id
        if self.style == "vicuna_v1" and first is not None and tokenizer("a")["input_ids"][0] != first:
            tokenizer.add_bos_token = True  # LLaVA-1.5 never saw a prompt without it
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return processor

    def copy_processor(self, folder: Path) -> None:
        """Copy the processor's files into a folder as they are, so that whatever reads the model there reads this one.

        transformers would write them anew for its own version, with this machine's choices in them.

        Raises:
            Fault: see ``load_processor``.
        """
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError

        self.load_processor()
        source = Path(self.source)
        if not source.is_dir():
            with self._loading():
                try:
                    source = Path(snapshot_download(self.source, allow_patterns=list(PROCESSOR_FILES)))
                except IncompleteSnapshotError as error:  # offline; what has just been loaded is there
                    source = Path(error.snapshot_path)
        for file in sorted({file for pattern in PROCESSOR_FILES for file in source.glob(pattern)}):
            (folder / file.relative_to(source).parent).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(source))

    def architecture_for(self, model_type: str) -> Architecture:
        """The architecture of these settings, or else the known one of the model's type."""
        return self.architecture or architecture_of(model_type)

    def known_architecture(self) -> Architecture:
        """``architecture_for`` the type that the model's configuration names.

        Raises:
            Fault: its files cannot be found.
        """
        from transformers import AutoConfig

        with self._loading():
            return self.architecture_for(AutoConfig.from_pretrained(self.source).model_type)

    def _attach(self, model: Any, adapter: Path, number: int) -> Any:
        """The model with an adapter's products added to its layers' outputs, and with the adapter's projector."""
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer

        adapted = PeftModel.from_pretrained(model, str(adapter))
        products = {}
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                lora: Any = module
                a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight * lora.scaling["default"]
                products[lora.get_base_layer()] = a.detach().to(model.dtype), b.detach().to(model.dtype)
        dtype = model.dtype
        model = adapted.unload()
        for layer, (a, b) in products.items():
            layer.register_buffer(f"earlier_{number}_a", a)
            layer.register_buffer(f"earlier_{number}_b", b)
            layer.register_forward_hook(functools.partial(_add_product, number))
        projector = self.architecture_for(model.config.model_type).projector
        for name, module in model.named_modules():
            if projector and name.endswith(projector):
                module.to(dtype)
        return model

    def _four_bits(self) -> dict[str, Any]:
        """The options of from_pretrained for a language model in four bits."""
        if find_spec("bitsandbytes") is None:
            raise Fault("model.quantize=4bit needs bitsandbytes, which is not installed: pip install 'povid[quantize]'")
        from transformers import BitsAndBytesConfig

        plan = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[self.dtype],
            llm_int8_skip_modules=self.known_architecture().unquantized(),
        )
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        return {"quantization_config": plan, "device_map": {"": device}}

    def _loading(self) -> AbstractContextManager[None]:
        return loading(self.source, f"model {self.name!r}: ")


@contextmanager
def loading(source: str, start: str = "") -> Iterator[None]:
    """Inside, what goes wrong while a model is read from a folder or from the hub becomes a Fault with its cure.

    ``start`` is how the sentence begins.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Fault:
        raise
    except Exception as error:  # of whatever library reads or downloads
        folder = Path(source).is_dir()
        sentence = None if folder else hub.trouble(error, source, f"https://huggingface.co/{source}")
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if sentence is None and isinstance(error, SafetensorError):
            cure = "put a whole copy there" if folder else f"remove it with `hf cache rm model/{source}` and run again"
            sentence = f"a file with the weights of {source!r} is cut or damaged ({reason}); {cure}"
        if sentence is None and isinstance(error, ImportError):  # a processor can need a package of its own
            sentence = next(filter(str.strip, str(error).splitlines()))
        if sentence is None and isinstance(error, OSError | ValueError):
            sentence = (
                f"{source!r} could not be loaded ({reason}); set model.path to a folder "
                "with its weights, or log in and go online so that they can be downloaded"
            )
        if sentence is None:
            raise
        raise Fault(start + sentence) from error


def _merge(model: Any, adapter: Path) -> Any:
    """The model with an adapter added to its weights, which keep their dtype."""
    from peft import PeftModel

    dtype = model.dtype
    model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    _cast(model, dtype)
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of the weights, in place. Buffers keep theirs: the frequencies of positions need float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def _add_product(number: int, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook: output + s (x A') B' of earlier adapter ``number``."""
    a, b = layer.get_buffer(f"earlier_{number}_a"), layer.get_buffer(f"earlier_{number}_b")
    return output + nn.functional.linear(nn.functional.linear(inputs[0].to(a.dtype), a), b).to(output.dtype)
