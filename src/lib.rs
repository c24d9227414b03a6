//! sarai keeps several language models available at once on one modest machine.
