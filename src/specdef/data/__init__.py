"""Data for models: packaged texts, the files and folders of users, MNIST."""
