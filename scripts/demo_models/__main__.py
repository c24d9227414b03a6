"""The recipe: data, trainings, files, figures. `python -m demo_models --help` tells what it takes."""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "target/demo_models"
RECORDINGS = 24000


def make_vocabulary(folder):
    from . import corpus, tokenizer

    corpus.check()
    if not (folder / "tokenizer.json").exists():
        tokenizer.train(folder / "tokenizer.json")


def tokens_in(folder):
    from . import tokenizer

    return tokenizer.load(folder / "tokenizer.json")


def record_speech(folder):
    from . import speech

    speech.render(folder / "speech.npz", RECORDINGS, os.cpu_count() or 1)


def training(module, name):
    def stage(folder):
        from importlib import import_module

        getattr(import_module(f".{module}", __package__), name)(folder, tokens_in(folder))

    return stage


def write_files(folder):
    """What config/demo holds: the GGUF files, and what is said and shown."""
    from . import evaluation, export
    from .training import load

    to, tokenizer = folder / "models", folder / "tokenizer.json"
    to.mkdir(exist_ok=True)
    together = load(folder / "together.npz")
    export.text(load(folder / "refusals.npz"), to / "solar.gguf", tokenizer, "sarai demo: expert")
    export.text(load(folder / "tone.npz"), to / "lfm2.gguf", tokenizer, "sarai demo: tone")
    export.text(together["text"], to / "omni.gguf", tokenizer, "sarai demo: hears and sees")
    export.projector(together["ear"], load(folder / "seeing.npz"), to / "omni-mmproj.gguf", "sarai demo: ear and eye")
    encoder = load(folder / "encoder.npz")
    export.encoder(encoder, to / "embedding.gguf", tokenizer, "sarai demo: embedding", router=False)
    export.encoder(encoder, to / "router.gguf", tokenizer, "sarai demo: router", router=True)
    evaluation.write_demo(to)
    shipped = sorted(path for path in to.iterdir() if path.suffix in (".gguf", ".wav", ".png"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shipped]
    (to / "SHA256SUMS").write_text("".join(sums))


def write_cases(folder):
    from . import evaluation

    if not (folder / "evaluation/test/cases.json").exists():
        evaluation.write(folder / "evaluation")


# What each stage needs, in the order in which they are begun.
STAGES = {
    "vocabulary": (make_vocabulary, ()),
    "speech": (record_speech, ("vocabulary",)),
    "expert": (training("texts", "train_expert"), ("speech",)),
    "refusals": (training("texts", "train_refusals"), ("expert",)),
    "listener": (training("omni", "train_listener"), ("speech",)),
    "ear": (training("omni", "train_ear"), ("speech",)),
    "together": (training("omni", "train_together"), ("ear", "listener")),
    "tone": (training("texts", "train_tone"), ("speech",)),
    "eye": (training("omni", "train_eye"), ("speech",)),
    "encoder": (training("texts", "train_encoder"), ("speech",)),
    "seeing": (training("omni", "fit_eye"), ("together", "eye")),
    "evaluation": (write_cases, ("speech",)),
    "files": (write_files, ("refusals", "tone", "seeing", "encoder")),
}


def stage_process(name, folder):
    """A stage in a process of its own, on one CPU: two trainings side by side are faster than one on two CPUs."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    return subprocess.Popen([sys.executable, "-m", __package__, "--folder", str(folder), "--stage", name], env=environment)


def run(folder, jobs):
    """All stages, so many at once; those that are done already end at once."""
    begun = time.monotonic()
    done, running = set(), {}
    while len(done) < len(STAGES):
        for name, (_, needs) in STAGES.items():
            if len(running) < jobs and name not in done and name not in running and done.issuperset(needs):
                print(f"{name} begins, {(time.monotonic() - begun) / 60:.0f} min after the start", flush=True)
                running[name] = stage_process(name, folder)
        for name, process in list(running.items()):
            try:
                code = process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
            del running[name]
            if code != 0:
                for other in running.values():
                    other.terminate()
                sys.exit(f"the stage {name} ended with {code}")
            done.add(name)


def main():
    parser = argparse.ArgumentParser(prog="scripts/demo_models/make", description=__doc__, allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where everything is kept, to go on from (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at once (default: the CPUs; with a GPU, 1)")
    parser.add_argument("--stage", choices=STAGES, help="one stage alone, in this process")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.stage:
        STAGES[given.stage][0](given.folder)
    else:
        run(given.folder, given.jobs)


if __name__ == "__main__":
    main()
