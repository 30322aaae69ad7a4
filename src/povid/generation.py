"""Captions and answers in batches; questions about one image share its prefix, which is computed once.

Shape suffixes: R = rows (questions) of a batch, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from povid.benchmarks.question import Decoding, Question
from povid.packing import shared_length
from povid.policy import Policy
from povid.preferences.datamodule import stack
from povid.preferences.template import Template
from povid.preferences.triple import Turn


@dataclass(slots=True)
class Group:
    """Questions about one image: their places in the list, token ids of each prompt, and the image's tensors."""

    indices: list[int]
    prompts: list[list[int]]
    images: dict[str, Tensor]

    @property
    def shared(self) -> int:
        """Length of the beginning (image included) that all prompts share."""
        first = self.prompts[0]
        return min(shared_length(first, other) for other in (self.prompts[1:] or [first]))


@dataclass(slots=True)
class Answers:
    """An ``Answerer`` for a loaded policy (see ``povid.benchmarks.question``).

    Args:
        policy, template: the model and how it is spoken to. batch_size: rows generated together.
        seed: of sampling; a question's answer depends on the seed and its id, not on the batch it falls into.
        share_prefix: compute an image's prefix once for all questions about it (token for token the same answers).
    """

    policy: Policy
    template: Template
    batch_size: int = 32
    seed: int = 0
    share_prefix: bool = True

    def __call__(self, questions: Sequence[Question], decoding: Decoding) -> Iterator[tuple[int, str]]:
        self.policy.eval()
        batches = self._batches(questions)
        with ThreadPoolExecutor(1) as ahead, torch.inference_mode():  # pictures are decoded while the model generates
            future = ahead.submit(self._prepare, questions, batches[0]) if batches else None
            for number in range(len(batches)):
                groups = future.result()
                if number + 1 < len(batches):
                    future = ahead.submit(self._prepare, questions, batches[number + 1])
                yield from self._answer(questions, groups, decoding)

    def _batches(self, questions: Sequence[Question]) -> list[list[list[int]]]:
        """Batches of groups of question numbers: an image's questions together, like lengths together."""
        by_image: dict[object, list[int]] = {}
        for number, question in enumerate(questions):
            key = question.image if self.share_prefix and self.policy.packable else number
            by_image.setdefault(key, []).append(number)
        groups = sorted(by_image.values(), key=lambda group: max(len(questions[i].text) for i in group))
        batches: list[list[list[int]]] = []
        rows = self.batch_size
        for group in groups:
            for part in (group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)):
                if rows + len(part) > self.batch_size:
                    batches.append([])
                    rows = 0
                batches[-1].append(part)
                rows += len(part)
        return batches

    def _prepare(self, questions: Sequence[Question], batch: list[list[int]]) -> list[Group]:
        groups = []
        for indices in batch:
            conversations = [(Turn("user", questions[i].text),) for i in indices]
            encoded, images = self.template.encode(conversations, questions[indices[0]].image, questions[indices[0]].id)
            groups.append(Group(indices, [entry.input_ids for entry in encoded], images))
        return groups

    def _answer(self, questions: Sequence[Question], groups: list[Group], decoding: Decoding
                ) -> Iterator[tuple[int, str]]:
        device = next(self.policy.parameters()).device
        images = {key: tensor.to(device) for key, tensor in stack([group.images for group in groups]).items()}
        indices = [index for group in groups for index in group.indices]
        produced = (self._generate if self.policy.packable else self._generate_plain)(groups, images, decoding, [
            self._generator(questions[index]) for index in indices
        ])
        for row, tokens in produced:
            yield indices[row], self.template.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def _generator(self, question: Question) -> torch.Generator:
        digest = sum(ord(letter) * 131**place for place, letter in enumerate(str(question.id)))
        return torch.Generator().manual_seed((self.seed * 1_000_003 + digest) % 2**63)

    def _generate(self, groups: list[Group], images: dict[str, Tensor], decoding: Decoding,
                  generators: list[torch.Generator]) -> Iterator[tuple[int, list[int]]]:
        """(row, tokens) as rows come to their end. One forward for the images' prefixes, one for all questions' rests,
        then one per token."""
        from transformers import DynamicCache

        policy, network = self.policy, self.policy.network
        device = next(policy.parameters()).device
        decoder, head = network.get_decoder(), network.get_output_embeddings()
        pad = self.template.processor.tokenizer.pad_token_id or 0
        ends = _end_tokens(network, self.template)

        shared = [group.shared for group in groups]
        prefix, mask = _left_pad([group.prompts[0][:n] for group, n in zip(groups, shared)], pad, device)
        cache = DynamicCache(config=network.config.get_text_config())
        decoder(inputs_embeds=policy.embed(prefix, policy.look(images)), attention_mask=mask, use_cache=True,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
        owners = [number for number, group in enumerate(groups) for _ in group.prompts]
        if owners != list(range(len(groups))):
            cache.batch_select_indices(torch.tensor(owners, device=device))
            mask = mask[owners]
        rests = [prompt[n:] for group, n in zip(groups, shared) for prompt in group.prompts]
        ids, rest_mask = _left_pad(rests, pad, device)
        alive = list(range(len(owners)))
        tokens: list[list[int]] = [[] for _ in alive]
        before = mask.sum(-1, keepdim=True)
        positions = before + (rest_mask.cumsum(-1) - 1).clamp(min=0)
        mask = torch.cat([mask, rest_mask], dim=1)
        for _ in range(decoding.max_new_tokens):
            hidden = decoder(inputs_embeds=network.get_input_embeddings()(ids), attention_mask=mask, use_cache=True,
                             position_ids=positions, past_key_values=cache).last_hidden_state[:, -1]
            chosen = _choose(head(hidden), decoding.temperature, [generators[row] for row in alive])
            going = []
            for place, (row, token) in enumerate(zip(alive, chosen.tolist())):
                tokens[row].append(token)
                if token in ends or len(tokens[row]) == decoding.max_new_tokens or self._stops(token, decoding):
                    yield row, tokens[row]
                else:
                    going.append(place)
            if not going:
                return
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            if len(going) < len(alive):  # finished rows are dropped
                keep = torch.tensor(going, device=device)
                cache.batch_select_indices(keep)
                ids, positions, mask = ids[keep], positions[keep], mask[keep]
                alive = [alive[place] for place in going]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)

    def _stops(self, token: int, decoding: Decoding) -> bool:
        return decoding.stop is not None and decoding.stop in self.template.processor.tokenizer.decode([token])

    def _generate_plain(self, groups: list[Group], images: dict[str, Tensor], decoding: Decoding,
                        generators: list[torch.Generator]) -> Iterator[tuple[int, list[int]]]:
        """transformers' own generation, for models whose language model needs more than tokens and positions."""
        network = self.policy.network
        device = next(self.policy.parameters()).device
        tokenizer = self.template.processor.tokenizer
        ids, mask = _left_pad([group.prompts[0] for group in groups], tokenizer.pad_token_id or 0, device)
        extra = {}
        if "mm_token_type_ids" in network.forward.__code__.co_varnames:
            extra["mm_token_type_ids"] = (ids == network.config.image_token_id).int()
        sampling = {"do_sample": True, "temperature": decoding.temperature} if decoding.temperature else {
            "do_sample": False}
        if decoding.temperature:
            torch.manual_seed(generators[0].initial_seed())
        output = network.generate(input_ids=ids, attention_mask=mask, **images, **extra, **sampling,
                                  max_new_tokens=decoding.max_new_tokens, pad_token_id=tokenizer.pad_token_id)
        yield from enumerate(output[:, ids.shape[1] :].tolist())


def _end_tokens(network: torch.nn.Module, template: Template) -> set[int]:
    ends = getattr(network.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return {token for token in (*ends, template.processor.tokenizer.eos_token_id) if token is not None}


def _left_pad(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [R, T] and their attention mask, padded on the left."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _choose(logits_RV: Tensor, temperature: float, generators: list[torch.Generator]) -> Tensor:
    """Greedy at temperature 0, else a sample by the Gumbel-max rule, each row from its own generator. [R]"""
    if not temperature:
        return logits_RV.argmax(-1)
    uniform = torch.stack([torch.rand(logits_RV.shape[1], generator=generator) for generator in generators])
    gumbel = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    return (logits_RV.float() / temperature + gumbel.to(logits_RV.device)).argmax(-1)
