"""Weights, gradients and optimizer states dealt out over processes, by DeepSpeed or by FSDP2; never by code of ours."""
