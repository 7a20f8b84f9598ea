"""Many users' generations in shared passes, each with edits of its own, against one by one and Hugging Face by hand."""
