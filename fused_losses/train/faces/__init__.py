"""The face recipe: people from pictures, some of them held out, judged by verification."""
