"""The models of a run, each built from its section: the policy from `model`, which is trained, and those of `roles`,
which are only read (a teacher, a reference).

Such a model's config, tokenizer and parameters come from its source. Opening it reads no parameters.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import NoReturn

from t5x_like.convert.stored import StoredModel
from t5x_like.core import dtypes
from t5x_like.core.errors import UsageError, UserError
from t5x_like.core.types import Tree
from t5x_like.inference.weights import in_dtype
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.objectives.reward import HEAD
from t5x_like.parallel import rules as sharding_rules
from t5x_like.parallel.pipeline import PipelineConfig
from t5x_like.runs.adapters import open_merged
from t5x_like.storage import paths, patterns
from t5x_like.training.state import Frozen, Source

POLICY = "policy"
BASE = "base"  # the policy without its adapter
REFERENCE, REWARD = "reference", "reward"

Opener = Callable[[str, str], StoredModel]  # (name of a role, its source) -> the model


@dataclasses.dataclass(frozen=True)
class RoleConfig:
    """`config.roles.NAME`: a model that a run reads and does not train.

    source: workdir (its newest checkpoint), model directory or Hugging Face folder; that of an adapter is merged into
    its base. A resume may find it elsewhere, but with the same parameters. rules: as in config.mesh.rules, for this
    model. dtype: what its matrices are held in, one of core/dtypes.py or "stored"; norms and biases stay as saved.
    """

    source: str
    rules: str
    dtype: str

    def check(self, path: str) -> None:
        if not self.source:
            raise UsageError(f"{path}.source is empty; name a workdir, model directory or Hugging Face folder")
        if self.dtype not in ("stored", *dtypes.NAMES):
            raise UsageError(f"{path}.dtype={self.dtype!r} should be 'stored' or one of {', '.join(dtypes.NAMES)}")


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A role of a run as built; its parameters are `frozen[name]` of the step."""

    model: Model
    part: Frozen
    stored: StoredModel


def build_model(
    config: model_config.ModelConfig,
    *,
    rules: str,
    platform: str,
    pipeline: PipelineConfig | None = None,
    field: str = "config.mesh.rules",
) -> Model:
    """The model of a config. `rules`: the text of the config's `field`; `platform`: of the devices that it runs on;
    `pipeline`: how it runs on a mesh with stages, None for layers that are gathered there."""
    dtype = config.dtype
    policy = dtypes.policy(params=dtype.params, compute=dtype.compute, platform=platform, products=dtype.products)
    return Model(config, sharding_rules.rules(rules, field=field), policy, pipeline)


def check_names(roles: Collection[str], wanted: Collection[str], *, objective: str) -> None:
    """The section `roles` names the models that the objective reads beside the policy, and no others."""
    needed = [name for name in wanted if name != POLICY]
    for name in needed:
        if name not in roles:
            raise UsageError(
                f"config.objective.name={objective!r} reads a model as {name!r}; give config.roles.{name} with a source"
            )
    for name in roles:
        if name not in needed:
            reads = " and ".join(needed) or "no model but the policy, config.model"
            raise UsageError(f"config.roles.{name} has no effect: config.objective.name={objective!r} reads {reads}")


def open_role(name: str, source: str) -> StoredModel:
    """The model of a role that a run reads."""
    del name
    return open_merged(patterns.one(source))


def open_or_assume(policy: model_config.ModelConfig, assumed: dict[str, str]) -> Opener:
    """For a plan, which may be made before the models are there: a role without one gets the shapes of the policy, and
    its name and source are added to `assumed`."""

    def opened(name: str, source: str) -> StoredModel:
        if paths.exists(patterns.one(source)):
            return open_role(name, source)
        assumed[name] = source
        config = dataclasses.replace(policy, scalar_heads=(HEAD,) if name == REWARD else ())
        return StoredModel(
            source,
            step=None,
            config=config,
            tokenizer=None,
            tokenizer_folder=None,
            start_token="pad",
            read=_absent,
        )

    return opened


def _absent(templates: Tree) -> NoReturn:
    raise RuntimeError("a model that a plan has assumed has no parameters")


def frozen_models(
    configs: Mapping[str, RoleConfig], *, length: int, platform: str, pipeline: PipelineConfig | None, opened: Opener
) -> dict[str, FrozenModel]:
    """The models of `config.roles`. `length`: tokens of the longest row that they read."""
    return {
        name: _frozen_model(name, config, length=length, platform=platform, pipeline=pipeline, opened=opened)
        for name, config in configs.items()
    }


def check_tokenizers(roles: Mapping[str, FrozenModel], tokenizer: str) -> None:
    """Raises UserError unless all models read the tokens of the run; `tokenizer` is the fingerprint of its own."""
    for name, role in roles.items():
        if role.stored.tokenizer not in (None, tokenizer):
            raise UserError(
                f"config.roles.{name}.source={role.stored.directory} was trained with another tokenizer "
                f"({role.stored.tokenizer[:12]}, here {tokenizer[:12]}); set config.data.tokenizer="
                f"{role.stored.tokenizer_folder}"
            )


def _frozen_model(
    name: str, config: RoleConfig, *, length: int, platform: str, pipeline: PipelineConfig | None, opened: Opener
) -> FrozenModel:
    path = f"config.roles.{name}"
    try:
        stored = opened(name, config.source)
    except UserError as error:
        raise UserError(f"{path}.source: {error}") from None
    if length > stored.config.max_length:
        raise UsageError(
            f"{path}.source={config.source} is a model of at most {stored.config.max_length} tokens, and rows have "
            f"{length}; shorten config.data.length"
        )
    model = build_model(stored.config, rules=config.rules, platform=platform, pipeline=pipeline, field=f"{path}.rules")
    specs = model.specs() if config.dtype == "stored" else in_dtype(model.specs(), config.dtype)
    source = Source(stored.directory, stored.read)
    return FrozenModel(model, Frozen(specs, model.rules, source), stored)
