"""The offline pipeline: collect → preference pairs → DPO → evaluate → report: stages that go on where they were killed.

The parts of training without its loop: rollouts of one frozen policy, scored by Regime W, become preferences. Without
torch but for `merge` and `dpo`, so that collecting and pairing run on a machine that only talks to engines.
"""
