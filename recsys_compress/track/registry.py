"""Finished runs as versions of a registered model, and versions as folders that can be loaded.

A version is made in one call, with all its tags, after its files are uploaded; what is killed
before leaves no version, and what is killed after has one without the alias. Registering the same
run again finishes what is unfinished and makes nothing twice.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema

from recsys_compress.compress.storage import StoragePlan
from recsys_compress.data.dataset import PreparedDataset
from recsys_compress.errors import UserError
from recsys_compress.files import sha256
from recsys_compress.serve import PACKAGES
from recsys_compress.serve.artifact import CARD, MANIFEST, Artifact, read_artifact
from recsys_compress.serve.export import export
from recsys_compress.serve.predictor import Predictor
from recsys_compress.serve.vectors import movement
from recsys_compress.track.pyfunc import ARTIFACT, CODE
from recsys_compress.track.run import PATIENCE, RUN_FILE
from recsys_compress.track.uri import DEFAULT_URI, alone, check_reachable, first_line, shown
