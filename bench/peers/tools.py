"""Times PyTorch's routines for the tool rows of a JSON file and prints {"ceilings": {}, "rows": {row: {peer: us}}}."""
import json
import sys

import torch
from sdpa import timed

SECONDS = 2.0  # of a routine: some take that long once


def decaying(batch, rows, cols):
    terms = min(rows, cols, 96)
    u = torch.linalg.qr(torch.randn(rows, terms, device="cuda"))[0]
    v = torch.linalg.qr(torch.randn(cols, terms, device="cuda"))[0]
    sigma = 100 * 0.95 ** torch.arange(terms, device="cuda")
    return ((u * sigma) @ v.T).expand(batch, rows, cols).contiguous()


def peers_of(row):
    a = decaying(row["batch"], row["rows"], row["cols"])
    version = f"-torch{torch.__version__}"
    if row["tool"] == "low-rank":
        columns = row["rank"] + row["oversampling"]
        return {"svd_lowrank" + version: timed(lambda: torch.svd_lowrank(a, q=columns, niter=row["power_iterations"]), seconds=SECONDS)}
    if row["tool"] == "spectral-norm":
        return {"matrix_norm" + version: timed(lambda: torch.linalg.matrix_norm(a, 2), seconds=SECONDS)}
    basis = torch.linalg.qr(torch.randn(row["batch"], row["cols"], row["rank"], device="cuda"))[0]

    def project():
        y = a @ basis
        return y, torch.linalg.vector_norm(a - y @ basis.mT, dim=-1)

    return {"matmul" + version: timed(project, seconds=SECONDS)}


def main():
    with open(sys.argv[1]) as file:
        rows = json.load(file)
    print(json.dumps({"ceilings": {}, "rows": {row["name"]: peers_of(row) for row in rows}}))


if __name__ == "__main__":
    main()
