"""The models of a run, each built from its section. Today a run has one, the policy: the section `model`."""

from t5x_like.core import dtypes
from t5x_like.models import config as model_config
from t5x_like.models.model import Model
from t5x_like.parallel import rules as sharding_rules


def build_model(config: model_config.ModelConfig, *, rules: str, platform: str) -> Model:
    """The model of a config. `rules`: `config.mesh.rules`; `platform`: of the devices that it runs on."""
    policy = dtypes.policy(params=config.dtype.params, compute=config.dtype.compute, platform=platform)
    return Model(config, sharding_rules.rules(rules), policy)
