% The detections in the files that evaluate.py --official-mat writes, read as the official code does.
%
%   octave-cli official_layout.m anno_bbox.mat DIR OBJECTS OUT.txt
%
% OBJECTS: the object classes in COCO's order, separated by commas. OUT.txt gets a line for each
% detection: class and image from 0, then the nine numbers of its row.
paths = argv();
anno = load(paths{1}, 'list_action');
objects = strsplit(paths{3}, ',');
found = zeros(0, 11);
for number = 1:80
  stored = load(fullfile(paths{2}, sprintf('detections_%02d.mat', number)));
  hoi_ids = find(strcmp({anno.list_action.nname}, objects{number}));
  assert(size(stored.all_boxes, 1) == numel(hoi_ids));
  for action = 1:numel(hoi_ids)
    for image = 1:size(stored.all_boxes, 2)
      boxes = stored.all_boxes{action, image};
      assert(size(boxes, 2) == 9);
      labels = repmat([hoi_ids(action) - 1, image - 1], size(boxes, 1), 1);
      found = [found; labels, boxes];
    end
  end
end
dlmwrite(paths{4}, found, 'precision', '%.17g');
