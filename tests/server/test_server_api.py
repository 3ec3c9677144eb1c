"""Every route against what numpy and the library say of the same vectors."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from small_server import COUNT, coded, picture

from clipworks.server.shelf import item_id, shown_key
from clipworks.server.tasks import NONE, auroc, vocabulary


def by_hand(kept, query, rows=None):
    """Names and cosines of rows, best first."""
    rows = np.arange(len(kept)) if rows is None else np.asarray(rows)
    scores = np.asarray(kept.vectors, np.float64)[rows] @ (query / np.linalg.norm(query))
    order = np.argsort(-scores, kind="stable")
    return [kept.keys[i] for i in rows[order]], scores[order]


def post(client, path, **body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def words(client, kept):
    """Vectors of words by the encoder itself."""
    from clipworks.store.identity import encoder_of

    model = encoder_of(kept)
    return lambda *texts: model.texts(list(texts)).numpy().astype(np.float64)


def test_words(client, kept, words):
    found = post(client, "/search", text="a striped thing", k=7)
    names, scores = by_hand(kept, words("a striped thing")[0])
    assert [item["name"] for item in found["items"]] == names[:7]
    np.testing.assert_allclose([item["score"] for item in found["items"]], scores[:7], atol=2e-4)
    assert (found["total"], found["more"]) == (COUNT, True)
    assert found["items"][0]["columns"]["caption"].startswith("picture ")


def test_words_minus_words(client, kept, words):
    found = post(client, "/search", text="stripes", minus=["noise", "red"], k=5)
    plus, *minus = words("stripes", "noise", "red")
    assert [item["name"] for item in found["items"]] == by_hand(kept, plus - 0.5 * sum(minus))[0][:5]


def test_pages_follow_each_other_to_the_end(client):
    whole = [i["id"] for i in post(client, "/search", text="stripes", k=COUNT)["items"]]
    pages, more = [], True
    while more:
        found = post(client, "/search", text="stripes", k=7, offset=len(pages))
        pages += [i["id"] for i in found["items"]]
        more = found["more"]
    assert pages == whole
    assert len(set(whole)) == COUNT


def test_an_image_finds_itself(client, kept):
    found = post(client, "/search", image=coded(picture(5)), k=1)
    assert found["items"][0]["name"] == "odd/05.png"
    assert found["items"][0]["score"] == pytest.approx(1, abs=2e-3)


def test_similar_images_leave_out_the_image_itself(client, kept):
    own = item_id("even/04.png")
    found = post(client, "/search", like=own, k=COUNT)
    names, _ = by_hand(kept, kept.vector("even/04.png").astype(np.float64))
    assert [item["name"] for item in found["items"]] == [name for name in names if name != "even/04.png"]
    assert not found["more"]
    odd = post(client, "/search", like=own, k=3, where=[{"column": "label", "value": "odd"}])
    assert [i["name"] for i in odd["items"]] == [n for n in names if n.startswith("odd")][:3]


def test_without_a_query_the_collection_is_listed(client, kept):
    found = post(client, "/search", k=5, offset=36)
    assert [item["name"] for item in found["items"]] == kept.keys[36:]
    assert found["items"][0]["score"] is None
    assert not found["more"]


@pytest.mark.parametrize(("condition", "meets"), [
    ({"column": "label", "value": "even"}, lambda i: i % 2 == 0),
    ({"column": "label", "operator": "is not", "value": "even"}, lambda i: i % 2 == 1),
    ({"column": "caption", "operator": "contains", "value": "PICTURE 1"}, lambda i: str(i)[0] == "1"),
    ({"column": "caption", "operator": "in", "value": ["picture 3", "picture 4"]}, lambda i: i in (3, 4)),
    ({"column": "caption", "operator": "missing"}, lambda i: False),
    ({"column": "mtime", "operator": "present"}, lambda i: True),
    ({"column": "mtime", "operator": "above", "value": 1}, lambda i: True),
    ({"column": "caption", "value": "x' OR '1' = '1"}, lambda i: False),
    ({"column": "caption", "operator": "contains", "value": "%"}, lambda i: False),
])  # fmt: skip
def test_conditions(client, condition, meets):
    found = post(client, "/search", where=[condition], k=COUNT)
    assert {item["name"][-6:-4] for item in found["items"]} == {f"{i:02}" for i in range(COUNT) if meets(i)}
    assert found["total"] == len(found["items"])
    if found["total"]:
        ranked = post(client, "/search", text="stripes", where=[condition], k=COUNT)
        assert {i["id"] for i in ranked["items"]} == {i["id"] for i in found["items"]}


def test_embed(client, words):
    found = post(client, "/embed", texts=["one", "two"], images=[coded(picture(1))])
    np.testing.assert_allclose(found["vectors"][:2], words("one", "two"), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found["vectors"], axis=1), 1, atol=1e-5)
    again = post(client, "/search", vector=found["vectors"][2], k=1)["items"][0]
    assert again["name"] == "odd/01.png"


def test_classify_and_none_of_these(client, kept):
    from clipworks.store.identity import encoder_of
    from clipworks.zeroshot.classifier import class_vectors

    model = encoder_of(kept)
    names = ["stripes", "noise"]
    text = class_vectors(names, model).numpy().astype(np.float64)
    ids = [item_id(key) for key in kept.keys]
    found = post(client, "/classify", names=names, ids=ids)
    x = np.asarray(kept.vectors, np.float64)
    cosines = x / np.linalg.norm(x, axis=1, keepdims=True) @ text.T
    odds = np.exp(model.logit_scale * cosines)
    odds /= odds.sum(1, keepdims=True)
    for answer, cosine, p in zip(found["answers"], cosines, odds, strict=True):
        np.testing.assert_allclose([answer["scores"][n] for n in names], p, atol=1e-4)
        best = names[int(p.argmax())]
        assert answer["label"] == (NONE if cosine.max() <= found["threshold"] + 1e-9 else best)
    from sklearn.mixture import GaussianMixture

    fits = np.sort(cosines.max(1))
    mixture = GaussianMixture(2, random_state=0, max_iter=500).fit(fits[:, None])
    assert mixture.means_.min() < found["threshold"] < mixture.means_.max()  # between those that fit and others
    assert 0 < sum(answer["label"] == NONE for answer in found["answers"]) < COUNT
    plain = post(client, "/classify", names=names, ids=ids, none=False)
    assert plain["threshold"] is None
    assert NONE not in {answer["label"] for answer in plain["answers"]}


def test_classify_a_file_as_the_collection_has_it(client):
    given, known = post(client, "/classify", names=["a", "b"], images=[coded(picture(8))],
                        ids=[item_id("even/08.png")], templates=["{}"])["answers"]  # fmt: skip
    assert given["id"] is None
    assert given["cosines"]["a"] == pytest.approx(known["cosines"]["a"], abs=2e-3)


def test_segment(client):
    from clipworks.segment.rle import decode

    found = post(client, "/segment", names=["sky", "tree"], id=item_id("even/02.png"), masks=True)
    assert (found["width"], found["height"]) == (36, 24)
    assert sum(name["share"] for name in found["names"]) == pytest.approx(1, abs=1e-5)
    for name in found["names"]:
        assert decode(name["mask"]).mean() == pytest.approx(name["share"], abs=1e-5)
    kind, _, data = found["overlay"].partition(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).width == 36


def test_inspect_by_words_and_by_good_images(client):
    by_words = post(client, "/inspect", image=coded(picture(3)), name="tile")
    assert by_words["method"] == "winclip"
    good = [item_id(f"even/{i:02}.png") for i in (0, 2, 4)]
    same = post(client, "/inspect", id=good[0], normal=good)
    assert same["method"] == "patch_memory"
    other = post(client, "/inspect", image=coded(Image.new("RGB", (36, 24), "red")), normal=good)
    assert other["score"] > same["score"]
    assert other["defective"] == (other["score"] > other["threshold"])


def test_compare(client, kept, words):
    evens = [item_id(key) for key in kept.keys if key.startswith("even")]
    odds = [item_id(key) for key in kept.keys if key.startswith("odd")]
    found = post(client, "/compare", a=evens, b=odds)
    assert found == post(client, "/compare", a=evens)
    assert found["counts"] == [20, 20]
    assert found["a"]
    x = np.asarray(kept.vectors, np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    even = np.array([key.startswith("even") for key in kept.keys])
    for side, one in (("a", even), ("b", ~even)):
        for told in found[side][:3]:
            score = x @ words(f"a photo of {told['word']}")[0]
            wins = (score[one][:, None] > score[~one][None]).mean()
            assert told["auroc"] == pytest.approx(wins, abs=2e-3)
            assert told["difference"] == pytest.approx(score[one].mean() - score[~one].mean(), abs=1e-4)
    assert [w["auroc"] for w in found["a"]] == sorted((w["auroc"] for w in found["a"]), reverse=True)


def test_auroc_counts_pairs():
    a, b = np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0])
    assert auroc(a, b) == np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert len(set(vocabulary())) == len(vocabulary()) > 400


def test_the_map_is_the_plane_of_most_variance(client, kept):
    from sklearn.decomposition import PCA

    found = client.get("/map").json()
    assert found["ids"] == [item_id(key) for key in kept.keys]
    x = np.asarray(kept.vectors, np.float64)
    fitted = PCA(2).fit(x)
    expected = fitted.transform(x)
    for name, axis in (("x", 0), ("y", 1)):
        assert abs(np.corrcoef(found[name], expected[:, axis])[0, 1]) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(found["explained"], fitted.explained_variance_ratio_, atol=1e-3)
    assert found == client.get("/map").json()


def test_pictures_by_id_are_new_jpegs(client):
    answer = client.get(f"/images/{item_id('odd/07.png')}?side=64")
    assert answer.headers["content-type"] == "image/jpeg"
    image = Image.open(io.BytesIO(answer.content))
    assert image.size == (36, 24)
    assert not image.getexif()
    assert client.get("/images/" + "0" * 16).status_code == 404


def test_what_is_served(client, kept):
    about = client.get("/collection").json()
    assert (about["rows"], about["dim"], about["fingerprint"]) == (COUNT, kept.dim, kept.fingerprint)
    label = next(column for column in about["columns"] if column["name"] == "label")
    assert {v["value"]: v["count"] for v in label["values"]} == {"even": 20, "odd": 20}


def test_health_metrics_and_descriptions(client):
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["status"] == "ready"
    post(client, "/search", text="counted", k=1)
    text = client.get("/metrics").text
    assert re.search(r'clipworks_requests_total\{route="/search",status="200"\} \d+', text)
    assert float(re.search(r"\nprocess_resident_memory_bytes (\S+)", text)[1]) > 1e7
    buckets = [int(n) for n in re.findall(r'clipworks_batch_size_bucket\{le="[^"]+"\} (\d+)', text)]
    assert buckets == sorted(buckets)
    assert buckets[-1] == int(re.search(r"clipworks_batch_size_count (\d+)", text)[1])
    assert all(re.fullmatch(r"# TYPE \w+ (counter|gauge|histogram)|\w+(\{[^}]*\})? \S+", line)
               for line in text.splitlines())  # fmt: skip
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/search", "/embed", "/classify", "/segment", "/inspect", "/images/{item}", "/healthz"} <= set(paths)
    page = client.get("/docs").text
    assert all(path in page for path in paths)
    assert "http" not in page.replace("http-equiv", "")  # nothing from outside


def test_the_page_needs_nothing_from_outside(client):
    for path in ("/", "/style.css", "/app.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert not re.search(r"""(src|href|url|import)\s*[=(]\s*["']?(https?:)?//""", answer.text)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"<style|<script>|style=|onclick=", client.get("/").text)  # the policy would stop them


def test_keys_that_are_paths_show_their_file_only():
    assert shown_key("2024/a.jpg") == "2024/a.jpg"
    assert shown_key("/home/me/a.jpg") == "a.jpg"
    assert shown_key("C:\\me\\a.jpg") == "a.jpg"
    assert shown_key("../b/a.jpg") == "a.jpg"
    assert shown_key("/home/me/a.jpg", expose_paths=True) == "/home/me/a.jpg"
