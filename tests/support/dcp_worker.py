"""Save an ESM-2 model that is sharded over two processes, as in an FSDP run: `torchrun dcp_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from esm2kit.core.processes import exit_process
from esm2kit.models.config import ESM2Config
from esm2kit.models.esm2 import ESM2, tokenize

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
model = ESM2.initialised(ESM2Config(2, 32, 4), seed=3)
mesh = init_device_mesh("cpu", (2,))
for layer in model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters())
model(tokenize(["MKTAYIAK"]))["logits"].square().mean().backward()
optimizer.step()  # so that the checkpoint contains the optimizer's averages
state = model.state_dict()
everything = {
    "state_dict": {f"esm2.{name}": tensor for name, tensor in state.items()},
    "optimizer_0": optimizer.state_dict(),
    "epoch": 3,
}
dcp.save(everything, checkpoint_id=folder / "dcp")
untied = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
dcp.save(untied, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / "shards"), save_distributed=True))
full_state = {name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)() for name, tensor in state.items()}
if dist.get_rank() == 0:
    torch.save(full_state, folder / "whole.pt")
dist.barrier()  # a process that exits before the other has finished makes both fail
dist.destroy_process_group()
exit_process(0)
