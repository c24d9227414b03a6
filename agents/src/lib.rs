//! What runs a model.
