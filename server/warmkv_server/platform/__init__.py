"""This process and this machine: its BLAS, its memory, its signals, its open files, its versions."""
