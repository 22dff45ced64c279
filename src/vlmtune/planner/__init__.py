"""How a plan is made, in a process of its own: `process` answers what `vlmtune.plan` asks.

Steps are simulated (`simulation`, by way of `ledger` and `kernels`) on what a recipe trains on (`material`), their memory and
time are told (`forecasting`), and settings compared (`fitting`).
"""
