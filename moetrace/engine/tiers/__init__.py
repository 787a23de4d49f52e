"""Parts of a machine beside a GPU, a home for experts and a plain link; compiled only for machines that have them.

More tiers (a CPU beside NDP units, a disk, remote functions) and links that stream, lose packets or change their rate.
The replay's lines are the same; where they differ stands here. Timing model, sections 10 and on.
"""
