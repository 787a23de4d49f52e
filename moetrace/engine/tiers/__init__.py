"""What some machines have beside a GPU, a home for experts and a plain link; compiled only for those that have it.

More tiers (a CPU beside NDP units, a disk, remote functions) and links that stream, lose packets or change their rate.
The replay's lines are the same; where they differ stands here. Timing model, sections 10 and on.
"""
