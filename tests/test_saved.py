"""Files that adaptvit 0.1.0 wrote, one for each way in which configs have changed since, load and say the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaptvit import AdaViTConfig, MergeConfig, load
from adaptvit.methods.ats import RandomConfig
from adaptvit.methods.released import ReleasedATSConfig, ReleasedAViTConfig, ReleasedDynamicViTConfig

FOLDER = Path(__file__).parent / "saved" / "0.1.0"
TODAY = {
    "adavit": AdaViTConfig,
    "ats": ReleasedATSConfig,
    "avit": ReleasedAViTConfig,
    "dynamicvit": ReleasedDynamicViTConfig,
    "merge": MergeConfig,
    "random": RandomConfig,
}


@pytest.mark.parametrize("name", TODAY)
def test_a_file_of_version_0_1_0_is_the_same_model(name: str) -> None:
    expected = load_file(FOLDER / "expected.safetensors")
    model = load(FOLDER / f"{name}.safetensors").eval()
    assert type(model.config) is TODAY[name]
    with torch.inference_mode():
        output = model(expected["images"], detailed=True)
    torch.testing.assert_close(output.logits, expected[name], atol=1e-5, rtol=1e-5)
    assert torch.equal(output.usage.depth, expected[f"{name}.depth"])
    assert model.dial is None
