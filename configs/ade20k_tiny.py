r"""UperNet on MSVMamba tiny for ADE20K's 150 classes, from an ImageNet checkpoint.

    python -m msvmamba_jax.train --config configs/ade20k_tiny.py --config.data.root=/datasets/ADEChallengeData2016 \
        --config.pretrained=vssm_tiny.pth --workdir runs/ade20k_tiny
    python -m msvmamba_jax.evaluate --config configs/ade20k_tiny.py --config.data.root=/datasets/ADEChallengeData2016 \
        --checkpoint runs/ade20k_tiny --config.data.tta=true

The recipe, with every option, is in ade20k.py. Expected: 47.8 mIoU is what the original's authors report for this
recipe (arXiv:2405.14174); this project has not trained it yet, so neither our score nor the cost in device hours is
measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.ade20k import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("msvmamba_tiny", drop_path=0.2)
