"""Semantic segmentation of made-up scenes: a small UperNet on a slim msvmamba_nano, from scratch, on a CPU.

    python scripts/make_scenes_dataset.py datasets/scenes
    python -m msvmamba_jax.train --config configs/shapes_segmentation.py --workdir runs/shapes
    python -m msvmamba_jax.evaluate --config configs/shapes_segmentation.py --checkpoint runs/shapes

Twenty classes of textured ground and shapes, in the folders of ADE20K. 12 epochs on two CPU cores, which other programs
used at the same time, took 14 minutes and ended at 67.0 % mIoU on the 100 evaluation images, and 67.5 % with
--config.data.tta=true.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The configuration; every value can be overridden on the command line."""
    return ConfigDict(
        {
            "task": "segmentation",
            "seed": 0,
            "data": {
                "source": "segmentation_folder",
                "root": "datasets/scenes",
                "reduce_zero_label": "true",  # label maps hold 0 for no class, 1 for the first one
                "workers": 0,  # processes that load and augment; 0: threads of the training process
                "scale": (256, 128),  # bounds of the long and the short side, pixels
                "crop": 128,  # side of the network's input in training, pixels
                "factor": (0.75, 1.5),  # of the scale, for training
                "max_class_part": 0.75,  # of a crop's pixels that one class may have
                "flip": 0.5,
                "distort": True,  # change brightness, contrast, saturation and hue
                "tta": False,  # evaluate with six sizes, each with its mirror image
                "bucket": 0,  # evaluate at multiples of so many pixels, for few shapes; 0: exact
            },
            # name: a variant; the other keys replace the variant's own values
            "model": {
                "name": "msvmamba_nano",
                "width": 24,
                "depths": (1, 1, 2, 1),
                "drop_path": 0.0,
                "channels": 48,
                "auxiliary_channels": 32,
            },
            "dtype": "float32",  # of the computation; "bfloat16" on GPUs
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint to start from: a folder, a run's workdir, or a released file
            "freeze_backbone": False,  # train the heads alone
            "batch_size": 8,  # over all devices
            "evaluation_per_device": 8,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "12 epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "linear",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 2e-3,
                "warmup_start": 2e-5,
                "minimum": 0.0,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 8,
                "warmup": "50 steps",
                "weight_decay": 0.01,
                "no_decay": "norms",  # what decays not: the backbone's norms; or "vectors", with biases
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 5.0,  # 0: no clipping
            },
            "ema_decay": 0.0,  # of averaged weights, for each step; 0: none
            "log_every": "25 steps",
            "evaluate_every": "4 epochs",
            "save_every": "4 epochs",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
