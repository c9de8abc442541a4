"""The command ``pyrodiff``: it trains, resumes, bounds and samples."""
