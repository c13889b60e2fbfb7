"""What the commands of the console script do. Their arguments and help are in ``lorafx_cli``, which needs no torch."""
