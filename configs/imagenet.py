"""The ImageNet-1k recipe of the original, which nano.py, micro.py, tiny.py and the vssm_*.py beside this file share.

300 epochs at 224 x 224 with a batch of 1024 over all devices (128 each on 8).
"""

from ml_collections import ConfigDict


def recipe(model: str, *, drop_path: float) -> ConfigDict:
    """The configuration for a variant and its highest rate of stochastic depth."""
    return ConfigDict(
        {
            "task": "classification",
            "seed": 0,
            "data": {
                "source": "folder",
                "root": "",  # the folder with train/ and val/
                "name": "",  # for the source "tfds": the data set's name, such as "imagenet2012"
                "data_dir": "",  # likewise: where it was prepared; empty: where TensorFlow Datasets looks
                "workers": 16,  # processes that load and augment; 0: threads of the training process
                "size": 224,
                "resize": 256,  # of the short side, for evaluation
                "interpolation": "bicubic",
                "randaugment": "rand-m9-mstd0.5-inc1",
                "scale": (0.08, 1.0),  # area of the random crop
                "ratio": (3 / 4, 4 / 3),  # its width over its height
                "flip": 0.5,
            },
            "model": {"name": model, "drop_path": drop_path},
            "dtype": "bfloat16",  # of the computation; parameters and the scan's state are float32
            "remat": False,  # recompute blocks in the backward pass to save memory
            "scan_implementation": "",  # of the selective scan; empty: by MSVMAMBA_SCAN, or the fastest that runs here
            "pretrained": "",  # a checkpoint to start from: a folder, a run's workdir, or a released file
            "freeze_backbone": False,  # train the head alone
            "batch_size": 1024,  # over all devices
            "evaluation_per_device": 0,  # images at a time in an evaluation; 0: as in training
            "parallelism": "jit",  # or "pmap": the state replicated on every device
            "fsdp": 1,  # "jit" only: devices over which parameters and optimiser state are split
            "accumulate": 1,  # parts in which a batch is worked through, to save memory
            "duration": "300 epochs",  # or "1000 steps"
            "optimizer": {  # AdamW; the three rates are for `batch_size` images and scale with config.batch_size
                "schedule": "cosine",  # after the warm-up: "cosine" or "linear" to `minimum`, or "steps" with `drops`
                "learning_rate": 5e-4,
                "warmup_start": 5e-7,
                "minimum": 5e-6,
                "drops": (),  # when the rate falls to a tenth, such as ("8 epochs", "11 epochs"); for "steps"
                "batch_size": 512,
                "warmup": "20 epochs",
                "weight_decay": 0.05,
                "no_decay": "vectors",  # what decays not: one-dimensional tensors and biases; or "norms"
                "layer_decay": 1.0,  # rate of each layer over that of the next; 1: the same for all
                "clip_norm": 5.0,
            },
            "label_smoothing": 0.1,
            "erase_probability": 0.25,  # of random erasing, for each image
            "mix": {  # mixup and CutMix: alpha of the weight's Beta distribution, 0: none
                "mixup": 0.8,
                "cutmix": 1.0,
                "switch_probability": 0.5,  # of CutMix where both are on
                "probability": 1.0,  # that a batch is mixed
            },
            "ema_decay": 0.9999,  # of the averaged weights, for each step
            "log_every": "100 steps",
            "evaluate_every": "5 epochs",
            "save_every": "1 epoch",
            "pictures": 8,  # validation images drawn into the workdir and TensorBoard at every evaluation; 0: none
            "profile": "",  # "20:25" writes a trace of the steps 21 to 25 into the workdir
        }
    )
