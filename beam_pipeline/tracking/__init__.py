"""MLflow: which run and model a job publishes, and where the model's files can be read. Workers never ask it.

`client` reaches a server or store, with the tokens of `auth`; `runs` and `models` find; `stores` and `download` are for
artifacts in places that Beam cannot read.
"""
