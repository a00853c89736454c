"""Weights, gradients and optimizer states sharded over processes, by DeepSpeed or by FSDP2; never by code of ours."""
