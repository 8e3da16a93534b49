"""The smallest distillation: a student of one layer learns from a model of configs/pretrain/test.py. For tests.

    t5x_like train --config=configs/pretrain/test.py --workdir=/tmp/teacher
    t5x_like train --config=configs/distill/test.py:/tmp/teacher --workdir=/tmp/student
Hardware: one CPU core, a few seconds. Expected: the divergence falls from 0.98 to 0.003 in 40 steps.
"""

from ml_collections import ConfigDict

from t5x_like.configs.pretrain import test as teacher_config


def get_config(teacher: str = "/tmp/teacher") -> ConfigDict:
    """`teacher`: a workdir, model directory or Hugging Face folder with this tokenizer."""
    config = teacher_config.get_config()
    config.model.width = 16
    config.model.decoder.update({"layers": 1, "head_size": 4, "mlp": 32})
    config.objective.name = "distill"
    config.objective.distill.update({"divergence": "forward_kl", "temperature": 2.0, "weight": 0.5})
    config.roles.teacher = {"source": teacher, "rules": "", "dtype": "stored"}
    return config
