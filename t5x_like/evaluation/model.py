"""What is evaluated: a model with its parameters and tokenizer, and how requests become its tokens.

The rules are those of lm-evaluation-harness's own backend (lm_eval/models/huggingface.py), so that scores compare.
"""

import dataclasses

from jax.sharding import Mesh

from t5x_like.core.errors import UserError
from t5x_like.core.types import Tree
from t5x_like.data.tokenizers import sentinels
from t5x_like.data.tokenizers.vocabularies import Vocabulary
from t5x_like.evaluation.chat import Requests
from t5x_like.inference.weights import for_decoding
from t5x_like.models.model import Model


@dataclasses.dataclass(frozen=True)
class EvaluatedModel:
    """A model ready to answer requests.

    name: what reports call it. start_id: what a decoder behind an encoder begins with. mesh: where the parameters lie,
    None for one device. chat: what its chat template writes, None to ask without one.
    """

    name: str
    model: Model
    params: Tree
    vocabulary: Vocabulary
    start_id: int
    mesh: Mesh | None
    chat: Requests | None

    @classmethod
    def of(
        cls,
        name: str,
        model: Model,
        params: Tree,
        vocabulary: Vocabulary,
        *,
        start_id: int,
        mesh: Mesh | None,
        chat: Requests | None,
    ) -> "EvaluatedModel":
        """With weights that are read best over and over: on a CPU a copy, layer by layer, instead of `params`."""
        return cls(name, *for_decoding(model, params), vocabulary, start_id, mesh, chat)

    @property
    def has_encoder(self) -> bool:
        return "encoder_inputs" in self.model.inputs

    @property
    def max_length(self) -> int:
        return self.model.config.max_length

    @property
    def prefix_id(self) -> int:
        """What stands before a text that has nothing before it: BOS, else EOS."""
        vocabulary = self.vocabulary
        found = vocabulary.eos_id if vocabulary.bos_id is None else vocabulary.bos_id
        if found is None:
            raise UserError(
                f"{self.name}: its tokenizer has neither BOS nor EOS, so that a text has nothing to begin after; "
                "name one in tokenizer_config.json"
            )
        return found

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: EOS, and of a conversation what ends a turn."""
        if self.chat is not None:
            return self.chat.stop_ids
        return [] if self.vocabulary.eos_id is None else [self.vocabulary.eos_id]

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Ids of a text. special: with BOS before it (a decoder) or EOS behind it (an encoder reads it), where the
        tokenizer has them; None: unless the text has its BOS already. A conversation has the BOS that its template
        writes, or none, as in training."""
        parts = None if self.chat is None else self.chat.parts(text)
        bos, eos = self.vocabulary.bos_id, self.vocabulary.eos_id
        if parts is not None:
            ids = self.vocabulary.encode_parts(parts)[0].tolist()
        else:
            ids = sentinels.encode(self.vocabulary, text) if self.has_encoder else self.vocabulary.encode(text)
        if special is False:
            return ids
        if self.has_encoder:
            return ids if eos is None else [*ids, eos]
        there = parts is not None or (special is None and ids[:1] == [bos])
        return ids if bos is None or there else [bos, *ids]
