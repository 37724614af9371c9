"""The controlled study of SFT against DPO, with seeds: `python -m study`."""
