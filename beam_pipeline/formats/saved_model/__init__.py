"""SavedModels of Keras and of `tf.saved_model.save`."""
