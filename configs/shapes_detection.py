"""Detection and instance segmentation of made-up objects: a small Mask R-CNN on a slim msvmamba_nano, from scratch.

    python scripts/make_objects_dataset.py datasets/objects
    python -m msvmamba_jax.train --config configs/shapes_detection.py --workdir runs/objects
    python -m msvmamba_jax.evaluate --config configs/shapes_detection.py --checkpoint runs/objects

Ten classes of shapes and patterned objects in COCO's form, with overlaps, crowds, tiny and large ones. 8 epochs on two
CPU cores, which other programs used at the same time, took 27 minutes and ended at 57.0 % box and 58.9 % mask AP (82.2
and 82.0 % at an overlap of 0.5) on the 100 evaluation images.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return ConfigDict(
        {
            "task": "detection",
            "seed": 0,
            "data": {
                "source": "coco",
                "root": "datasets/objects",
                "train_images": "train2017",
                "train_annotations": "annotations/instances_train2017.json",
                "evaluation_images": "val2017",
                "evaluation_annotations": "annotations/instances_val2017.json",
                "workers": 0,  # processes that load and augment; 0: threads of the training process
                "scale": (192, 160),  # bounds of the long and the short side, pixels
                "multi_scale": False,  # COCO's sizes of the recipe of 36 epochs
                "flip": 0.5,
                "bucket": 64,  # evaluate padded to multiples of so many pixels, for few shapes; 0: exact
            },
            # name: a variant; the other keys replace the variant's own values
            "model": {
                "name": "msvmamba_nano",
                "width": 24,
                "depths": (1, 1, 2, 1),
                "drop_path": 0.0,
                "channels": 48,
                "hidden": 128,
            },
            "regions": {
                "proposals": (200, 100),  # of the RPN in training: of each level before, and of all after suppression
                "evaluation_proposals": (200, 100),
                "anchor_samples": 64,  # of an image, that the RPN learns from, half of them positive
                "region_samples": 64,  # of an image, that the heads learn from, a quarter of them positive
            },
            "dtype": "float32",  # of the computation; "bfloat16" on GPUs
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint to start from: a folder, a run's workdir, or a released file
            "freeze_backbone": False,  # train all but the backbone
            "batch_size": 4,  # over all devices
            "evaluation_per_device": 4,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "8 epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "cosine",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 1e-3,
                "warmup_start": 1e-5,
                "minimum": 0.0,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 4,
                "warmup": "200 steps",
                "weight_decay": 0.05,
                "no_decay": "norms",  # what decays not: the backbone's norms; or "vectors", with biases
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 5.0,  # 0: no clipping
            },
            "ema_decay": 0.0,  # of averaged weights, for each step; 0: none
            "log_every": "25 steps",
            "evaluate_every": "2 epochs",
            "save_every": "1 epoch",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
