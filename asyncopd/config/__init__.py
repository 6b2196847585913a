"""Configuration: what a run is made of (`schema`), the estimators' and tasks' settings, and how files become one."""

from asyncopd.config.engines import (
    HfTeacher,
    ModelConfig,
    OpenAITeacher,
    OracleTeacher,
    PretrainedModel,
    TinyModel,
    VllmTeacher,
)
from asyncopd.config.load import load_config, parse_override
from asyncopd.config.schema import RunConfig

__all__ = [
    "HfTeacher",
    "ModelConfig",
    "OpenAITeacher",
    "OracleTeacher",
    "PretrainedModel",
    "RunConfig",
    "TinyModel",
    "VllmTeacher",
    "load_config",
    "parse_override",
]
