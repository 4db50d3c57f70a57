"""From text to Megatron's token files: the `taid-data` command and the functions behind it.

Read in order: sources (text in), tokenizers, indexed_writer (tokens out), manifest (what lies on
disk, shared with the trainer), prepare (the four together). Nothing here imports torch or
megatron.
"""
