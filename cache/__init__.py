"""The activation cache: all reading and writing of activations on disk. Imports only `common`."""
