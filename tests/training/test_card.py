from paella_diffusers.training.card import without_folders


def test_a_long_prompt_is_no_path():
    """Not even one that is longer than a file's name may be, with a slash after that."""
    prompt = "a very detailed photo " * 20 + "of a horse/zebra"
    assert without_folders(prompt) == prompt and without_folders(f"--prompts={prompt}") == f"--prompts={prompt}"


def test_paths_lose_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    found = [without_folders(argument) for argument in (str(tmp_path / "a"), "data/pictures", "--data=./b", "owner/data")]
    assert found == ["a", "pictures", "--data=b", "owner/data"]
