"""The run that the tests of `fit` begin, break and resume; as a script, in a process that can be
killed.

python fitted.py FOLDER [MOMENT]      MOMENT: "step N", or "rename N": before the Nth rename of a snapshot
"""

import os
import signal
import sys
from pathlib import Path

import torch

import funcattn as fa

CONFIG = fa.Config(
    vocabulary=13, width=8, layers=2, heads=2, kv_heads=1, head_size=4, feed_forward=12, context=16
)
TEXT = fa.random.randint(fa.key(5), (200,), 0, CONFIG.vocabulary)
STEPS = 11


def begin(folder=None, *, loss=fa.loss, **options):
    model = fa.decoder(CONFIG)
    training = fa.training
    optimizer = training.chain(
        training.clip(1.0), training.adamw(training.cosine(1e-2, STEPS, warmup=2))
    )
    settings = {
        "steps": STEPS,
        "rows": 2,
        "context": 8,
        "report_every": 4,
        "evaluations": 2,
        "save_every": 3,
        "progress": False,
    }
    return training.fit(
        fa.key(3),
        model,
        model.init(fa.key(0)),
        TEXT,
        optimizer=optimizer,
        validation=TEXT[:50],
        loss=loss,
        folder=folder,
        **settings | options,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, moment = sys.argv[1], sys.argv[2].split()
    calls, number = [0], int(moment[1])
    rename = Path.rename

    def counted_loss(model, params, batch):
        if torch.is_grad_enabled():  # a step, and no evaluation
            calls[0] += 1
            if calls[0] == number:
                die()
        return fa.loss(model, params, batch)

    def counted_rename(path, target):
        calls[0] += 1
        if calls[0] == number:
            die()
        return rename(path, target)

    if moment[0] == "step":
        begin(folder, loss=counted_loss, resume=True)
    else:
        Path.rename = counted_rename
        begin(folder, resume=True)
