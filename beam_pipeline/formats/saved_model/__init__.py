"""SavedModels of Keras and of `tf.saved_model.save`.

`checkpoint`, `object_graph` and `functions` are the parts of the files; `lookup_tables`, `gathers` and `indexes` find
what is in them; `reader` says which of it are towers.
"""
