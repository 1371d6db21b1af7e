"""The notebook of examples/, run offline with a hypernetwork that the test makes."""

from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from shared import ROOT, tiny


def test_the_notebook_predicts_draws_trains_and_compares(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tiny(max_shape=(16, 16, 7, 7)).save_pretrained(tmp_path / "ghn")
    notebook = load_notebook_node(str(ROOT / "examples" / "colab.ipynb"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), "committed clean"
    values = {"source": str(tmp_path / "ghn"), "network": "squeezenet1_1", "image_size": 32, "steps": 2}
    notebook = parameterize_notebook(notebook, values)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    loaded, predicted, drawn, _, compared = [cell for cell in notebook.cells if cell.cell_type == "code"][2:]
    assert "10 classes" in loaded.outputs[0].text and "predicted" in predicted.outputs[0].text
    assert "image/png" in drawn.outputs[-1].data and "image/png" in compared.outputs[-1].data
    assert compared.outputs[0].data["text/plain"].split()[:2] == ["random", "predicted"]
