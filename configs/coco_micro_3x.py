r"""Mask R-CNN on MSVMamba micro for COCO, 36 epochs at several image sizes, from an ImageNet checkpoint.

    python -m msvmamba_jax.train --config configs/coco_micro_3x.py --config.data.root=/datasets/coco \
        --config.pretrained=vssm_micro.pth --workdir runs/coco_micro_3x
    python -m msvmamba_jax.evaluate --config configs/coco_micro_3x.py --config.data.root=/datasets/coco \
        --checkpoint runs/coco_micro_3x

The recipe, with every option, is in coco.py. Expected: box / mask AP of 46.3 / 41.8 is what the original's authors
report for this recipe (arXiv:2405.14174); this project has not trained it yet, so neither our score nor the cost in
device hours is measured.
"""

from ml_collections import ConfigDict

from msvmamba_jax.configs.coco import recipe


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return recipe("msvmamba_micro", epochs=36, drops=(27, 33), multi_scale=True)
