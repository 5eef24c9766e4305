"""One small command of every stage, for tests that run all of them."""

from pathlib import Path

from support.finetune_fixtures import write_tasks, write_tiny_model

# commands with tests of their own: two reports, the network, notebooks, a shell
ELSEWHERE = {"compare", "download", "verify", "notebooks", "run", "rerun", "completion"}


def write_inputs(folder: Path) -> None:
    """Write the model, the tasks and the FASTA file that the commands read."""
    write_tiny_model(folder / "m.safetensors")
    write_tasks(folder / "tasks", 24)
    lines = [f">p{i}\n{'MKVLAGSTRE' * 2}{letter}\n" for i, letter in enumerate("ACDEFGHIKLMNPQRSTVWY")]
    (folder / "a.fasta").write_text("".join(lines), encoding="utf-8")


def list_commands(work: Path, out: Path) -> list[list[str]]:
    """List one small command of every stage; none names a device.

    Only ELSEWHERE is left out.

    Args:
        work: The folder of `write_inputs`.
        out: The folder of the results.
    """
    few = ["--seeds", "0", "--resamples", "100", "--untrained", "false", "--baselines", '["majority"]']
    task = ["protein_class", "--data_dir", f"{work}/tasks", "--model", f"{work}/m.safetensors"]
    shape = ["--model", "custom", "--num_layers", "1", "--embed_dim", "16", "--attention_heads", "2"]
    steps = ["--max_steps", "2"]
    fasta = [f"{work}/a.fasta", "--model", f"{work}/m.safetensors"]
    return [
        ["embed", *fasta, "--out_dir", f"{out}/e"],
        ["preprocess", f"{work}/a.fasta", "--val_size", "3", "--out_dir", f"{out}/d", "--leakage_identity", "0"],
        ["benchmark", *task, "--out_dir", f"{out}/b", *few],
        ["finetune", *task, "--out_dir", f"{out}/f", *steps, "--resamples", "100", "--benchmark", "false"],
        ["predict", f"{work}/a.fasta", "--model", f"{out}/f", "--out", f"{out}/p.tsv"],
        ["pretrain", "--data", f"{out}/d", "--out_dir", f"{out}/t", *shape, *steps, "--warmup_steps", "1"],
        ["export", f"{work}/m.safetensors", "--out", f"{out}/hf"],
        ["check", str(out)],
        ["runs"],
        ["map", *fasta, "--out_dir", f"{out}/m"],
        ["contacts", *fasta, "--values", "coupling", "--out_dir", f"{out}/c"],
        ["score", *fasta, "--out_dir", f"{out}/s"],
        ["split", f"{work}/a.fasta", "--method", "random", "--out_dir", f"{out}/sp"],
        ["neighbours", *fasta, "--reference", f"{out}/e/a_embeddings.h5", "--out_dir", f"{out}/n"],
        ["convert", f"{out}/e/a_embeddings.h5", "--out", f"{out}/a.csv"],
    ]
