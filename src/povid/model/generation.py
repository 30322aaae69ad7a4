"""Captions and answers in batches; the prefix that questions about one image share is computed once.

Shape suffixes: R = rows (questions) of a batch, V = vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from povid.fault import Fault
from povid.internals import attention_name
from povid.model.architectures import SLIDING, layer_kinds
from povid.model.packing import shared_length, stack
from povid.model.policy import Policy
from povid.model.question import WHOLE, Decoding, Question, Share
from povid.model.template import Template
from povid.preferences.triple import Turn

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Group:
    """Questions about one image: their indices, the token ids of each prompt, and the image's tensors.

    A question without an image is a group by itself, without tensors.
    """

    indices: list[int]
    prompts: list[list[int]]
    images: dict[str, Tensor]

    @property
    def shared(self) -> int:
        """Length of the prefix, image included, that all prompts share."""
        first = self.prompts[0]
        return min(shared_length(first, other) for other in (self.prompts[1:] or [first]))


@dataclass(slots=True)
class Answers:
    """An ``Answerer`` for a loaded policy (see ``povid.model.question``).

    Args:
        policy, template: the model and how it is prompted.
        batch_size: rows generated together; on a GPU fewer if the memory is short.
        seed: of sampling. A question's answer depends on seed, id and text, not on its batch.
        share_prefix: compute an image's prefix once for all questions about it; the answers are the same. Not done for
            models with sliding-window attention.
        share: the part that this process answers. It consists of whole batches, and where answers depend on their
            batch (``LocalModel.answers_depend_on_batch``) the batches are those that a single process makes.
        fetch_every: tokens between two looks at what the model has said, for each of which the host waits for the
            device; None: 1 on a CPU, where nothing waits, and else 8. Rows that have ended run on until the next look.
            The answers are the same.

    Raises:
        Fault: a prompt is longer than the model reads, an image is missing or broken, or a question has no image and
            the model needs one.
    """

    policy: Policy
    template: Template
    batch_size: int = 32
    seed: int = 0
    share_prefix: bool = True
    share: Share = WHOLE
    fetch_every: int | None = None

    @torch.inference_mode()  # a decorator, since the context manager would stay active between yields
    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        yield from self.stream(questions, decoding)

    def stream(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        """The same for a caller that switches gradients off by itself: split weights refuse inference mode."""
        self.policy.eval()
        batches = self._batches(questions)[self.share.number :: self.share.of]
        with ThreadPoolExecutor(1) as ahead:  # decodes the next batch's pictures while the model generates
            future = ahead.submit(self._prepare, questions, batches[0]) if batches else None
            for number in range(len(batches)):
                groups = future.result()
                if number + 1 < len(batches):
                    future = ahead.submit(self._prepare, questions, batches[number + 1])
                for part in split(groups, self._affordable(groups, decoding)):
                    yield from self._answer(questions, part, decoding)

    def _batches(self, questions: Sequence[Question]) -> list[list[list[int]]]:
        """Question indices by batch and group: questions of an image together, and then by similar length.

        A batch holds questions with an image or without one, never both.
        """
        # Behind a shared prefix shorter questions are padded, and a sliding window would count the padding.
        windows = SLIDING in layer_kinds(self.policy.network.config.get_text_config())
        alone = windows or not self.policy.packable or self.policy.architecture.question_in_image
        share = self.share_prefix and not alone
        by_image: dict[object, list[int]] = {}
        for number, question in enumerate(questions):
            by_image.setdefault(question.image if share and question.image is not None else number, []).append(number)
        batches: list[list[list[int]]] = []
        most = self.batch_size
        if self.share.of > 1 and not self.policy.settings.answers_depend_on_batch:
            most = min(most, -(-len(questions) // self.share.of))  # or few questions would make one process's batch
        for with_image in (True, False):
            groups = [group for group in by_image.values() if (questions[group[0]].image is not None) is with_image]
            groups.sort(key=lambda group: max(len(questions[i].text) for i in group))
            rows = most
            for group in groups:
                for part in (group[i : i + most] for i in range(0, len(group), most)):
                    if rows + len(part) > most:
                        batches.append([])
                        rows = 0
                    batches[-1].append(part)
                    rows += len(part)
        return batches

    def _affordable(self, groups: list[Group], decoding: Decoding) -> int:
        """The number of rows whose keys and values fit into two thirds of the GPU's free memory."""
        from povid.model.key_values import bytes_per_token

        parameter = next(self.policy.parameters())
        if parameter.device.type != "cuda":
            return self.batch_size
        free = torch.cuda.mem_get_info(parameter.device)[0] + (
            torch.cuda.memory_reserved(parameter.device) - torch.cuda.memory_allocated(parameter.device)
        )
        length = max(len(prompt) for group in groups for prompt in group.prompts) + decoding.max_new_tokens
        return max(1, int(2 / 3 * free / (length * bytes_per_token(self.policy.network))))

    def _prepare(self, questions: Sequence[Question], batch: list[list[int]]) -> list[Group]:
        longest = getattr(self.policy.network.config.get_text_config(), "max_position_embeddings", None)
        groups = []
        for indices in batch:
            first = questions[indices[0]]
            conversations = [(Turn("user", questions[i].text),) for i in indices]
            encoded, images = self.template.encode(conversations, first.image, first.id)
            for i, entry in zip(indices, encoded):
                if longest and len(entry.input_ids) >= longest:
                    raise Fault(
                        f"question {questions[i].id!r}: its prompt takes {len(entry.input_ids)} tokens, and the "
                        f"model reads at most {longest}, answer included; shorten or remove the question"
                    )
            groups.append(Group(indices, [entry.input_ids for entry in encoded], images))
        return groups

    def _answer(
        self, questions: Sequence[Question], groups: list[Group], decoding: Decoding
    ) -> Iterator[tuple[int, str]]:
        if self.policy.architecture.needs_image and not groups[0].images:
            raise Fault(
                f"question {questions[groups[0].indices[0]].id!r} has no image, and {self.policy.model_type!r} "
                "models cannot answer without one; remove the question"
            )
        device = next(self.policy.parameters()).device
        images = {key: tensor.to(device) for key, tensor in stack([group.images for group in groups]).items()}
        indices = [index for group in groups for index in group.indices]
        generate = self._generate if self.policy.packable else self._generate_unpacked
        produced = generate(groups, images, decoding, [self._generator(questions[index]) for index in indices])
        for row, tokens in produced:
            yield indices[row], self.template.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _generator(self, question: Question) -> torch.Generator:
        return torch.Generator().manual_seed(question.seed(self.seed))

    def _generate(
        self, groups: list[Group], images: dict[str, Tensor], decoding: Decoding, generators: list[torch.Generator]
    ) -> Iterator[tuple[int, list[int]]]:
        """(row, tokens) as rows end: a forward pass for all prefixes, one for all remaining prompts, one per token."""
        from povid.model.key_values import key_values  # imports transformers, which takes seconds

        policy, network = self.policy, self.policy.network
        device = next(policy.parameters()).device
        decoder, head = network.get_decoder(), network.get_output_embeddings()
        pad = self.template.processor.tokenizer.pad_token_id or 0
        ends = _end_tokens(network, self.template)

        shared = [group.shared for group in groups]
        prefix, mask = _left_pad([group.prompts[0][:length] for group, length in zip(groups, shared)], pad, device)
        cache = key_values(network.config.get_text_config())
        read = partial(decoder, use_cache=True, **{_cache_name(decoder): cache})
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = policy.decoder_inputs(prefix, counted, mask.bool(), policy.look(images))
        read(**inputs, attention_mask=self._first_mask(prefix, mask, counted, inputs["inputs_embeds"].dtype, images))
        # A picture takes fewer positions than tokens where positions have three axes.
        before = mask.sum(-1, keepdim=True)
        if inputs["position_ids"].ndim == 3:
            before = before + inputs["position_ids"].amax((0, 2))[:, None] - counted[:, -1:]
        owners = [number for number, group in enumerate(groups) for _ in group.prompts]
        if owners != list(range(len(groups))):
            cache.batch_select_indices(torch.tensor(owners, device=device))
            mask, before = mask[owners], before[owners]
        rests = [prompt[length:] for group, length in zip(groups, shared) for prompt in group.prompts]
        padded = len(set(shared)) > 1 or len(set(map(len, rests))) > 1
        ids, rest_mask = _left_pad(rests, pad, device)
        rows = list(range(len(owners)))
        tokens: list[list[int]] = [[] for _ in rows]
        done: set[int] = set()
        positions = before + (rest_mask.cumsum(-1) - 1).clamp(min=0)
        mask = torch.cat([mask, rest_mask], dim=1)
        seen: Tensor | None = mask
        every = self.fetch_every or (1 if device.type == "cpu" else 8)
        unseen: list[Tensor] = []  # the tokens since the last look, [R] each
        for count in range(1, decoding.max_new_tokens + 1):
            hidden = read(
                inputs_embeds=network.get_input_embeddings()(ids), attention_mask=seen, position_ids=positions
            ).last_hidden_state[:, -1]
            chosen = _choose(head(hidden), decoding.temperature, [generators[row] for row in rows])
            unseen.append(chosen)
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            if len(unseen) < every and count < decoding.max_new_tokens:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
                seen = self._next_mask(mask, padded)
                continue
            for row, said in zip(rows, torch.stack(unseen, 1).tolist()):
                for token in said:
                    if row in done:
                        break
                    tokens[row].append(token)
                    if (
                        token in ends
                        or len(tokens[row]) == decoding.max_new_tokens
                        or self._stops(tokens[row], decoding)
                    ):
                        done.add(row)
                        yield row, tokens[row]
            unseen.clear()
            going = [place for place, row in enumerate(rows) if row not in done]
            if not going:
                return
            if len(going) <= 0.875 * len(rows):  # dropping finished rows copies the cache, so it happens seldom
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                ids, positions, mask = ids[keep], positions[keep], mask[keep]
                rows = [rows[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            seen = self._next_mask(mask, padded)

    def _next_mask(self, mask: Tensor, padded: bool) -> Tensor | None:
        """The mask with which one more token is read.

        From ``mask`` itself transformers would find out for every token whether it hides anything, for which the host
        waits for the device. Other attention than sdpa, and windows, need it nevertheless.
        """
        config = self.policy.network.config.get_text_config()
        if attention_name(config) != "sdpa" or SLIDING in layer_kinds(config):
            return mask
        return mask[:, None, None, :].bool() if padded else None

    def _first_mask(self, ids: Tensor, mask: Tensor, positions: Tensor, dtype: torch.dtype, images: object) -> Any:
        """The mask with which prefixes are read: ``mask`` itself, unless the tokens of a picture see each other."""
        if not (self.policy.architecture.two_way_images and images):
            return mask
        causal = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).tril()
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        return self.policy.masks((causal & mask.bool()[:, None]) | itself, ids, positions, dtype)

    def _stops(self, tokens: list[int], decoding: Decoding) -> bool:
        """Whether the last token completes the text ``decoding.stop``."""
        if decoding.stop is None:
            return False
        last = tokens[-len(decoding.stop.encode()) - 1 :]  # a token is at least one byte
        return decoding.stop in self.template.processor.tokenizer.decode(last, skip_special_tokens=True)

    def _generate_unpacked(
        self, groups: list[Group], images: dict[str, Tensor], decoding: Decoding, generators: list[torch.Generator]
    ) -> Iterator[tuple[int, list[int]]]:
        """``_generate`` by transformers' own generation, for models whose sequences cannot be packed."""
        network = self.policy.network
        device = next(self.policy.parameters()).device
        pad = self.template.processor.tokenizer.pad_token_id or 0
        ids, mask = _left_pad([group.prompts[0] for group in groups], pad, device)
        start = ids.shape[1]

        def sampled(_: Tensor, logits_RV: Tensor) -> Tensor:
            return _noisy(logits_RV, decoding.temperature, generators)

        def stopped(ids_RT: Tensor, _: Tensor, **unused) -> Tensor:
            return torch.tensor([self._stops(row, decoding) for row in ids_RT[:, start:].tolist()], device=device)

        output = network.generate(
            input_ids=ids,
            attention_mask=mask,
            **images,
            **(self.policy.token_kinds(ids) if images else {}),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=decoding.max_new_tokens,
            pad_token_id=pad,
            logits_processor=[sampled] if decoding.temperature else None,
            stopping_criteria=[stopped] if decoding.stop else None,
        )
        ends = _end_tokens(network, self.template)
        for row, tokens in enumerate(output[:, start:].tolist()):
            last = next(
                (i + 1 for i, token in enumerate(tokens) if token in ends or self._stops(tokens[: i + 1], decoding)),
                len(tokens),
            )
            yield row, tokens[:last]


def split(groups: list[Group], rows: int) -> Iterator[list[Group]]:
    """Split groups into parts of at most ``rows`` questions each; a larger group is divided."""
    part: list[Group] = []
    for group in groups:
        for i in range(0, len(group.indices), rows):
            piece = Group(group.indices[i : i + rows], group.prompts[i : i + rows], group.images)
            if part and sum(len(other.indices) for other in part) + len(piece.indices) > rows:
                yield part
                part = []
            part.append(piece)
    if part:
        yield part


def _end_tokens(network: nn.Module, template: Template) -> set[int]:
    """Tokens after which an answer ends."""
    ends = getattr(network.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (*ends, template.processor.tokenizer.eos_token_id) if token is not None}


def _cache_name(decoder: nn.Module) -> str:
    """The name of a decoder's key-value argument: ``cache`` from transformers 5.24 on, before ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


def _left_pad(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [R, T] and their attention mask, padded on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _choose(logits_RV: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    """A token per row, [R]: greedy at temperature 0, else sampled from the row's own generator."""
    return (_noisy(logits_RV, temperature, generators) if temperature else logits_RV).argmax(-1)


def _noisy(logits_RV: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    """Logits [R, V] whose largest entry is a sample of softmax(logits / temperature) (the Gumbel-max trick)."""
    uniform = torch.stack([torch.rand(logits_RV.shape[1], generator=generator) for generator in generators])
    gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    return logits_RV.float() / temperature + gumbel.to(logits_RV.device)
