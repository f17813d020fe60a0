r"""MSVMamba nano (48 channels, blocks 1-2-5-2) on ImageNet-1k, from scratch.

    python -m msvmamba_jax.train --config configs/nano.py \
        --config.data.root=/datasets/imagenet --workdir runs/nano

The folder holds train/ and val/ with a folder for each class. The recipe, with every option, is in imagenet.py.
Expected: 77.3 % top-1 is what the original's authors report for this recipe (arXiv:2405.14174, table 1);
this project has not trained it yet, so neither our score nor the cost in device hours is measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.imagenet import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("msvmamba_nano", drop_path=0.2)
