"""What a run stands on, whatever it trains: device, processes, checkpoints, log."""
