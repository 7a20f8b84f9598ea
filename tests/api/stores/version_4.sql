BEGIN TRANSACTION;
CREATE TABLE contents (
    owner TEXT NOT NULL,
    digest TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    used REAL NOT NULL,
    is_uploaded INTEGER NOT NULL,
    PRIMARY KEY (owner, digest)
);
INSERT INTO "contents" VALUES('default','3585ac93f9e9fd1ddfd7365ced99d6a3086eec5f1185435270941e6f254f24b2',144,1.79575754155883955958e+09,1);
CREATE TABLE deployments (
    model TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    progress TEXT NOT NULL,
    updated REAL NOT NULL,
    spec TEXT,
    mode TEXT NOT NULL DEFAULT 'serving',
    revision INTEGER NOT NULL DEFAULT 1,
    replicas TEXT NOT NULL DEFAULT '[]',
    source TEXT,
    dtype TEXT,
    description BLOB,
    tokenizer BLOB
);
INSERT INTO "deployments" VALUES('m','ready','ready',1.79575754155462384226e+09,'{"name": "m", "source": "/models/m", "stages": 1, "ranks": 1, "replicas": 1, "dtype": "auto", "device": "auto", "cpus": null, "random_weights_seed": null, "offload_bytes": 0}','serving',1,'[]',NULL,NULL,NULL,NULL);
CREATE TABLE edits (
    model TEXT NOT NULL,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    version INTEGER NOT NULL,
    is_shared INTEGER NOT NULL,
    created REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    body BLOB,
    PRIMARY KEY (model, owner, name, version)
);
INSERT INTO "edits" VALUES('m','default','mine',1,0,1.79575754155715370174e+09,4,X'65646974');
CREATE TABLE facts (id TEXT PRIMARY KEY, json BLOB NOT NULL);
INSERT INTO "facts" VALUES('370a75a617ff99862a448b10a8840c22',X'5B5D');
INSERT INTO "facts" VALUES('a900e17f66ecb05a84c829cf088e8cc1',X'5B5D');
CREATE TABLE kept (
    owner TEXT NOT NULL,
    is_state INTEGER NOT NULL,
    name TEXT NOT NULL,
    dtype TEXT NOT NULL,
    shape TEXT NOT NULL,
    digest TEXT NOT NULL,
    version INTEGER NOT NULL,
    request TEXT,
    expires REAL,
    PRIMARY KEY (owner, is_state, name)
);
INSERT INTO "kept" VALUES('default',1,'s','uint8','[16]','3585ac93f9e9fd1ddfd7365ced99d6a3086eec5f1185435270941e6f254f24b2',1,NULL,NULL);
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    owner TEXT NOT NULL DEFAULT 'default',
    state TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    work INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    passes_done INTEGER NOT NULL DEFAULT 0,
    passes INTEGER NOT NULL DEFAULT 0,
    logs TEXT NOT NULL DEFAULT '[]',
    error TEXT
);
INSERT INTO "requests" VALUES(1,'29dba334702cc83c3420762e7f42680d','m','default','done',1.79575754155789589884e+09,1.79575754156006956105e+09,1.79575754156142210963e+09,3,1,0,0,0,'[]',NULL);
INSERT INTO "requests" VALUES(2,'370a75a617ff99862a448b10a8840c22','m','default','running',1.79575754155875182147e+09,1795757541.56007,NULL,3,1,0,0,0,'[]',NULL);
INSERT INTO "requests" VALUES(3,'a900e17f66ecb05a84c829cf088e8cc1','m','default','queued',1.79575754155962657933e+09,NULL,NULL,3,0,0,0,0,'[]',NULL);
CREATE TABLE room (part TEXT PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE uses (
    id TEXT NOT NULL,
    seq INTEGER,
    owner TEXT NOT NULL,
    state TEXT,
    is_update INTEGER NOT NULL DEFAULT 0,
    digest TEXT
);
INSERT INTO "uses" VALUES('370a75a617ff99862a448b10a8840c22',2,'default',NULL,0,'3585ac93f9e9fd1ddfd7365ced99d6a3086eec5f1185435270941e6f254f24b2');
CREATE INDEX requests_open ON requests (model, state, seq) WHERE state IN ('queued', 'running');
CREATE INDEX kept_digest ON kept (owner, digest);
CREATE INDEX uses_id ON uses (id);
CREATE INDEX uses_state ON uses (owner, state, seq) WHERE state IS NOT NULL;
CREATE INDEX uses_digest ON uses (owner, digest) WHERE digest IS NOT NULL;
CREATE INDEX room_id ON room (id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('requests',3);
COMMIT;
PRAGMA user_version = 4;
